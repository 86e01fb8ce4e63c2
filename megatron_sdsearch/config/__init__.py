"""The run's settings: frozen sections, read from YAML with dotted overrides, checked before anything slow starts.

Every default is the paper's or AutoRefine's recipe where one is published; where neither says, the comment gives the
reason. Relative paths are taken from the working directory, and ``~`` is a home directory. Nothing here imports torch.
"""

from megatron_sdsearch.config.loading import check_is_mapping, field_errors, load_config, parse_config, read_tree
from megatron_sdsearch.config.lookup import default_of, flatten, with_current_names
from megatron_sdsearch.config.retrieval import (
    ElasticsearchConfig,
    RemoteSearchConfig,
    ReplayConfig,
    RetrievalConfig,
    RetrieveServerConfig,
)
from megatron_sdsearch.config.rollout import RolloutConfig, SGLangConfig
from megatron_sdsearch.config.rules import is_server_url, no_model
from megatron_sdsearch.config.run import RunConfig
from megatron_sdsearch.config.secrets import is_secret, may_hold_secret, shown_command
from megatron_sdsearch.config.sections import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    HindsightConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    TelemetryConfig,
    TrainConfig,
)
from megatron_sdsearch.config.types import PROBLEMS, expand_home, path_argument, shown_url

__all__ = [
    "PROBLEMS",
    "CheckpointConfig",
    "DataConfig",
    "ElasticsearchConfig",
    "EvaluationConfig",
    "HindsightConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RemoteSearchConfig",
    "ReplayConfig",
    "RetrievalConfig",
    "RetrieveServerConfig",
    "RolloutConfig",
    "RunConfig",
    "SGLangConfig",
    "TelemetryConfig",
    "TrainConfig",
    "check_is_mapping",
    "default_of",
    "expand_home",
    "field_errors",
    "flatten",
    "is_secret",
    "is_server_url",
    "load_config",
    "may_hold_secret",
    "no_model",
    "parse_config",
    "path_argument",
    "read_tree",
    "shown_command",
    "shown_url",
    "with_current_names",
]
