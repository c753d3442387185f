from .chain import Chain as Chain
from .chain import Link as Link
from .chain import NotFinite as NotFinite
from .chain.coefficients import Aer as Aer
from .chain.coefficients import Constant as Constant
from .chain.coefficients import Cosine as Cosine
from .chain.coefficients import Linear as Linear
from .chain.coefficients import OnCollapse as OnCollapse
from .chain.coefficients import ProportionalIntegral as ProportionalIntegral
from .chain.coefficients import StepToTarget as StepToTarget
from .recipe.config import GRPOConfig as GRPOConfig
from .recipe.config import RLOOConfig as RLOOConfig
from .recipe.config import build_chain as build_chain
from .recipe.config import known_terms as known_terms
from .trainer import GRPOTrainer as GRPOTrainer
from .trainer import RLOOTrainer as RLOOTrainer
from .types import Effect as Effect
from .types import Quantiles as Quantiles
from .types import Rollout as Rollout
from .types import RolloutEffect as RolloutEffect
from .types import Term as Term
from .types import TokenBatch as TokenBatch
from .types import Total as Total
from .types import Transcript as Transcript
from .watch.callback import CollapseCallback as CollapseCallback
from .watch.collapse import CollapseDetector as CollapseDetector

__version__: str
