"""Names of the metrics that progress display, summary and page use; a run may log others, too.

A name is ``section/metric``; the comment above it gives unit and meaning. Shares and scores lie in [0, 1]. Unless the
comment says otherwise, a metric is the mean over the step's trajectories on all ranks, without those lost to a failed
search or to the engine.
"""

from typing import Final

#: Prefix of metrics of sampled rollouts.
TRAIN_PREFIX: Final = "train/"
#: Prefix of the same metrics of greedy rollouts over held-out questions.
EVAL_PREFIX: Final = "eval/"
#: Prefix of the hit rates of queries sampled from teacher and student (telemetry.query_probe).
PROBE_PREFIX: Final = "probe/"
#: Score: the shaped reward that advantages are computed from.
REWARD: Final = "train/reward"
#: Score: exact match of the answer.
EM: Final = "train/em"
#: Score: token F1 of the answer.
F1: Final = "train/f1"
#: Share of trajectories that were shown the passage with the answer; absent when the data set does not name it.
HIT_RATE: Final = "train/hit_rate"
#: Searches per trajectory.
NUM_SEARCHES: Final = "train/num_searches"
#: Tokens of a query without its tags: mean over the step's queries; absent when there is none.
QUERY_TOKENS: Final = "train/query_tokens"
#: Nats: -log p under the engine, mean over the step's query tokens; absent when there is none. Also logged without
#: distillation.
QUERY_ENTROPY: Final = "train/query_entropy"
#: Trajectories of the step.
NUM_TRAJECTORIES: Final = "train/num_trajectories"
#: Trajectories ended by a failed search or by the engine: not trained on, and not in any mean.
NUM_LOST: Final = "train/num_lost"
#: Trajectories ended by a failed search, part of the lost ones.
NUM_RETRIEVAL_FAILED: Final = "train/num_retrieval_failed"
#: Trajectories that never started: not trained on, but wrong answers in the means.
NUM_PROMPT_TOO_LONG: Final = "train/num_prompt_too_long"
#: Generations that ended with EOS and neither searched nor answered.
NUM_EOS_WITHOUT_ACTION: Final = "train/num_eos_without_action"
#: Prefix of the share of all trajectories with one status; followed by the status.
STATUS_PREFIX: Final = "train/status/"
#: Share of groups with all siblings correct by F1.
SHARE_ALL_CORRECT: Final = "train/share_all_correct"
#: Share of groups with all siblings wrong by F1.
SHARE_ALL_WRONG: Final = "train/share_all_wrong"
#: Groups that are trained on although all siblings are correct or all are wrong by F1; over all ranks.
NUM_WITHOUT_CONTRAST: Final = "train/num_without_contrast"
#: Groups without contrast that were replaced by another question's, over all ranks. No other metric counts them: with
#: refills, EM, F1 and reward describe only the remaining groups and do not measure the policy.
NUM_REFILLED: Final = "train/num_refilled"
#: Share of groups in which every advantage is 0: rewards are equal, or fewer than two siblings count. GRPO learns
#: nothing from them. A group without contrast by F1 may still have advantages, from a shaped reward or partial F1.
SHARE_WITHOUT_ADVANTAGE: Final = "train/share_without_advantage"

#: Share of trajectories with a gold answer inside a query.
LEAK_SHARE: Final = "hindsight/leak_share"
#: Trajectories with a gold answer inside a query.
NUM_LEAKS: Final = "hindsight/num_leaks"
#: Trajectories with a hindsight block that hindsight.max_block_tokens cut to nothing: they are not distilled.
NUM_EMPTIED: Final = "hindsight/num_emptied"

#: Nats: mean over the distilled tokens, weighted as in objective.distill_aggregation; absent when there is none. With a
#: group class after it (``loss/jsd_all_correct``, ``_all_wrong``, ``_mixed``), over the groups of that class.
JSD: Final = "loss/jsd"
#: Nats: logged instead of the JSD with objective.divergence=forward_kl.
FORWARD_KL: Final = "loss/forward_kl"
#: Nats: logged instead of the JSD with objective.divergence=reverse_kl.
REVERSE_KL: Final = "loss/reverse_kl"
#: Squared error of probabilities: logged instead of the JSD with objective.divergence=mse.
MSE: Final = "loss/mse"
#: L_SD, the factor of alpha in the loss: the mean divergence or, over all_trajectories, that times the share of
#: trajectories that are distilled.
DISTILL: Final = "loss/distill"
#: Nats: entropy of the student minus that of the teacher, over the whole vocabulary at the sampling temperature;
#: averaged and split by class as the JSD. Positive where hindsight makes the policy more certain.
ENTROPY_GAP: Final = "loss/entropy_gap"
#: The clipped GRPO loss.
POLICY_LOSS: Final = "loss/policy"
#: Nats: k3 estimate of KL(policy || reference), mean over policy tokens.
KL: Final = "loss/kl"
#: Norm before clipping, mean over the step's updates.
GRAD_NORM: Final = "loss/grad_norm"
#: Nats: absolute difference between the log-probabilities of engine and trainer, mean over policy tokens. This and the
#: next three are weighted as the loss is, summed over microbatches and ranks, and averaged over the step's updates.
ROLLOUT_GAP: Final = "loss/rollout_gap"
#: Share of policy tokens with a gap above loss.grpo.LARGE_GAP = 0.1 nats.
ROLLOUT_GAP_SHARE: Final = "loss/rollout_gap_share"
#: Nats: k3 estimate of KL(engine || trainer).
ROLLOUT_K3: Final = "loss/rollout_k3"
#: Share of policy tokens that the importance correction truncated or masked; absent without a correction.
IMPORTANCE_CUT_SHARE: Final = "loss/importance_cut_share"
#: Nats: the largest gap of any token on any rank.
ROLLOUT_GAP_MAX: Final = "loss/rollout_gap_max"

#: Score: exact match over held-out questions, greedy, without lost trajectories.
EVAL_EM: Final = "eval/em"
#: Score: token F1, as EVAL_EM.
EVAL_F1: Final = "eval/f1"
#: Held-out questions asked.
EVAL_NUM_TRAJECTORIES: Final = "eval/num_trajectories"
#: Lost ones of these, as NUM_LOST.
EVAL_NUM_LOST: Final = "eval/num_lost"
#: Never started ones of these, as NUM_PROMPT_TOO_LONG.
EVAL_NUM_PROMPT_TOO_LONG: Final = "eval/num_prompt_too_long"
#: Same as HIT_RATE.
EVAL_HIT_RATE: Final = "eval/hit_rate"
#: Same as NUM_SEARCHES.
EVAL_NUM_SEARCHES: Final = "eval/num_searches"

#: Prefix of counts of a remote search engine since the last step, over all ranks; followed by a field of
#: retrieval.batched.SearchCounts: queries, requests, retries, failures or outages.
RETRIEVAL_PREFIX: Final = "retrieval/"
#: Policy tokens of the step per second of the step.
TOKENS_PER_SECOND: Final = "time/tokens_per_second"
#: Seconds of the step, without evaluations, probes and checkpoints.
STEP_SECONDS: Final = "time/step"
#: Prefix of the seconds of one phase of the step; followed by its name.
PHASE_PREFIX: Final = "time/phase/"
