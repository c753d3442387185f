from .activation_steering import ActivationSteering as ActivationSteering
from .adaptive_temperature import AdaptiveTemperature as AdaptiveTemperature
from .diff_adapt import DiffAdapt as DiffAdapt
from .edt import Edt as Edt
from .em_inf import EmInf as EmInf
from .model_switching import ModelSwitching as ModelSwitching
from .power_sampling import PowerSampling as PowerSampling
from .stable_entropy import StableEntropy as StableEntropy
