from .adaptive_temperature import AdaptiveTemperature as AdaptiveTemperature
from .edt import Edt as Edt
from .em_inf import EmInf as EmInf
from .stable_entropy import StableEntropy as StableEntropy
