from .branch import Branch as Branch
from .sampler import Sampler as Sampler
from .strategy import Asked as Asked
from .strategy import Response as Response
from .strategy import RolloutStrategy as RolloutStrategy
