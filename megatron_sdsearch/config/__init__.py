"""The run's settings: frozen sections, read from YAML with dotted overrides, checked before anything slow starts.

Defaults are the paper's or AutoRefine's where they are published; otherwise the setting's docstring gives the reason.
Relative paths start at the working directory, and ``~`` is expanded. Nothing here imports torch.
"""

from megatron_sdsearch.config.loading import examine_tree, load_config, parse_config, read_tree
from megatron_sdsearch.config.lookup import default_of, flatten, is_secret, shown_command, with_current_names
from megatron_sdsearch.config.retrieval import (
    ElasticsearchConfig,
    RemoteSearchConfig,
    ReplayConfig,
    RetrievalConfig,
    RetrieveServerConfig,
)
from megatron_sdsearch.config.rollout import RolloutConfig, SGLangConfig
from megatron_sdsearch.config.rules import file_problems, no_model, path_problems, setting_warnings
from megatron_sdsearch.config.run import RunConfig
from megatron_sdsearch.config.sections import (
    CheckpointConfig,
    DataConfig,
    HindsightConfig,
    ModelConfig,
    ObjectiveConfig,
    ParallelConfig,
)
from megatron_sdsearch.config.types import expand_home, path_argument, shown_url

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "ElasticsearchConfig",
    "HindsightConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "ParallelConfig",
    "RemoteSearchConfig",
    "ReplayConfig",
    "RetrievalConfig",
    "RetrieveServerConfig",
    "RolloutConfig",
    "RunConfig",
    "SGLangConfig",
    "default_of",
    "examine_tree",
    "expand_home",
    "file_problems",
    "flatten",
    "is_secret",
    "load_config",
    "no_model",
    "parse_config",
    "path_argument",
    "path_problems",
    "read_tree",
    "setting_warnings",
    "shown_command",
    "shown_url",
    "with_current_names",
]
