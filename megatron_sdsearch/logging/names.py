"""Names of the metrics that the progress display and the page know; a run may log any others beside them.

A name is ``section/what``. Shares and scores lie in [0, 1], divergences are in nats, times in seconds. Unless a line
says otherwise, a number is the mean over the step's trajectories on all ranks that were not lost, to a failed search
or by the engine.
"""

from typing import Final

TRAIN_PREFIX: Final = "train/"
EVAL_PREFIX: Final = "eval/"
"""Of the numbers of sampled and of greedy rollouts; the same names follow."""
REWARD: Final = "train/reward"
"""The shaped reward that advantages come from."""
EM: Final = "train/em"
F1: Final = "train/f1"
HIT_RATE: Final = "train/hit_rate"
"""Share of trajectories that were shown the passage holding the answer; absent when the data set does not name it."""
NUM_SEARCHES: Final = "train/num_searches"
QUERY_TOKENS: Final = "train/query_tokens"
"""Tokens of a query, tags not counted; mean over the step's queries; absent without one, as is the next."""
QUERY_ENTROPY: Final = "train/query_entropy"
"""Nats; -log p under the engine that sampled, mean over the step's query tokens: an estimate that needs no teacher, so
that a run without distillation has it, too."""
NUM_LOST: Final = "train/num_lost"
"""Trajectories that a failed search or the engine has ended: out of training, and in no mean."""
NUM_PROMPT_TOO_LONG: Final = "train/num_prompt_too_long"
"""Trajectories that never began; out of training, and wrong answers in the means."""
NUM_EOS_WITHOUT_ACTION: Final = "train/num_eos_without_action"
"""Generations that ended with EOS and neither searched nor answered."""
NUM_WITHOUT_CONTRAST: Final = "train/num_without_contrast"
"""Groups learned from whose siblings are all right or all wrong by F1; over all ranks, as are the next two."""
NUM_REFILLED: Final = "train/num_refilled"
"""Groups without contrast that gave way to another question. They are in no other number of the step: with refills
EM, F1 and reward are those of the groups that stayed, and no measure of the policy."""
SHARE_WITHOUT_ADVANTAGE: Final = "train/share_without_advantage"
"""Share of groups in which every advantage is 0: their rewards are equal, or fewer than two siblings count. GRPO learns
nothing from them. A group without contrast by F1 may still have some, from a shaped reward or from partial F1."""
LEAK_SHARE: Final = "hindsight/leak_share"
"""Share of trajectories with a gold answer inside a query."""

NUM_EMPTIED: Final = "hindsight/num_emptied"
"""Trajectories of the step with a teacher prompt that ``hindsight.max_block_tokens`` left nothing of: there nothing is
distilled."""

JSD: Final = "loss/jsd"
"""Mean over the distilled tokens, weighed against each other as ``objective.distill_aggregation`` does; absent when
nothing was distilled. Another divergence has its own name in place of ``jsd``."""
DISTILL: Final = "loss/distill"
"""L_SD, which alpha multiplies: the JSD's mean or, over ``all_trajectories``, that times the share of trajectories that
are distilled."""
ENTROPY_GAP: Final = "loss/entropy_gap"
"""Entropy of the student minus that of the teacher, nats, over the whole vocabulary at the sampling temperature; the
same mean as the JSD's, and absent with it. Positive where hindsight makes the policy surer."""
POLICY_LOSS: Final = "loss/policy"
KL: Final = "loss/kl"
"""k3 to the reference policy, mean over policy tokens."""
GRAD_NORM: Final = "loss/grad_norm"
"""Before clipping, mean over the step's updates."""
ROLLOUT_GAP: Final = "loss/rollout_gap"
"""Nats between the log-probabilities of engine and trainer, absolute; mean over policy tokens. Like the next three it
is weighted as the loss is, summed over microbatches and ranks, and averaged over the step's updates."""
ROLLOUT_GAP_SHARE: Final = "loss/rollout_gap_share"
"""Share of policy tokens whose gap exceeds ``loss.grpo.LARGE_GAP`` = 0.1 nats."""
ROLLOUT_K3: Final = "loss/rollout_k3"
"""k3 estimate of KL(engine || trainer)."""
IMPORTANCE_CUT_SHARE: Final = "loss/importance_cut_share"
"""Share of policy tokens that the importance correction truncated or masked; absent without a correction."""
ROLLOUT_GAP_MAX: Final = "loss/rollout_gap_max"
"""The largest gap of any token on any rank: a maximum throughout."""

EVAL_EM: Final = "eval/em"
"""Over held-out questions, greedy; of those whose trajectory was not lost."""
EVAL_NUM_TRAJECTORIES: Final = "eval/num_trajectories"
EVAL_NUM_LOST: Final = "eval/num_lost"
"""Of them; as ``NUM_LOST``."""
EVAL_NUM_PROMPT_TOO_LONG: Final = "eval/num_prompt_too_long"
"""Of them; as ``NUM_PROMPT_TOO_LONG``."""
EVAL_F1: Final = "eval/f1"
EVAL_HIT_RATE: Final = "eval/hit_rate"
EVAL_NUM_SEARCHES: Final = "eval/num_searches"

RETRIEVAL_PREFIX: Final = "retrieval/"
"""Followed by a name of ``retrieval.batching.SearchCounts``: queries, requests, retries, overloads, failures and
outages of a remote search engine since the step before, over all ranks."""
TOKENS_PER_SECOND: Final = "time/tokens_per_second"
"""Policy tokens of the step over the step's seconds."""
PHASE_PREFIX: Final = "time/phase/"
"""Followed by a phase's name: seconds of it in the step."""
STEP_SECONDS: Final = "time/step"
JSD_BY_CLASS_PREFIX: Final = "loss/jsd_"
"""Followed by ``all_correct``, ``all_wrong`` or ``mixed``: the same over groups of one class."""
ENTROPY_GAP_BY_CLASS_PREFIX: Final = "loss/entropy_gap_"
"""As the prefix before."""
