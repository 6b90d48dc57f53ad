"""The configuration of a run: one tree of frozen dataclasses."""

from ccu_jax.config.method_defaults import BadTeacher as BadTeacher
from ccu_jax.config.method_defaults import Ccu as Ccu
from ccu_jax.config.method_defaults import CcuPlus as CcuPlus
from ccu_jax.config.method_defaults import Contrastive as Contrastive
from ccu_jax.config.method_defaults import CoUn as CoUn
from ccu_jax.config.method_defaults import Delete as Delete
from ccu_jax.config.method_defaults import Finetune as Finetune
from ccu_jax.config.method_defaults import GradientAscent as GradientAscent
from ccu_jax.config.method_defaults import L1Sparse as L1Sparse
from ccu_jax.config.method_defaults import LastLayers as LastLayers
from ccu_jax.config.method_defaults import MultiDelete as MultiDelete
from ccu_jax.config.method_defaults import NegGradPlus as NegGradPlus
from ccu_jax.config.method_defaults import RandomLabel as RandomLabel
from ccu_jax.config.method_defaults import Scrub as Scrub
from ccu_jax.config.method_defaults import SfrOn as SfrOn
from ccu_jax.config.method_defaults import Ssd as Ssd
from ccu_jax.config.schema import Config as Config
from ccu_jax.config.schema import Corruptions as Corruptions
from ccu_jax.config.schema import Data as Data
from ccu_jax.config.schema import Model as Model
from ccu_jax.config.schema import Run as Run
from ccu_jax.config.schema import Train as Train
from ccu_jax.config.schema import Unlearn as Unlearn
