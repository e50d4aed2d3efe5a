"""Every metric name that training writes and evaluation reads.

Training and evaluation share no other agreement about names: both import them from here.
"""

from __future__ import annotations

# History rows, one per optimizer step.
GLOBAL_STEP = "global_step"  # optimizer steps since the start of the run, from 1
EPOCH = "epoch"  # epochs completed, fractional inside an epoch
TRAIN_LOSS = "train_loss"  # mean cross-entropy, or squared error, of the step's examples, penalty excluded
LEARNING_RATE = "learning_rate"
GRADIENT_NORM = "gradient_norm"  # L2 norm over all trainable parameters, penalty included, before clipping
PENALTY = "penalty"  # value of the method's regularization term (0 for LoRA)
FISHER_WARMUP = "fisher_warmup"  # 1 while importances are being measured, else 0
ACTIVE_RANK = "active_rank"  # AdaLoRA: triplets not masked, over all modules

# History rows, one per epoch.
TRAIN_EPOCH_LOSS = "train_epoch_loss"  # mean over the epoch's examples, dropout on, weights changing
TRAIN_EPOCH_ACCURACY = "train_epoch_accuracy"
EVAL_LOSS = "eval_loss"  # cross-entropy, or squared error, alone, for every method

# Summary.
COMPLETED = "completed"  # true only after the last epoch was evaluated
PRIMARY_METRIC = "primary_metric"  # the name of the eval metric that is compared
TRAINING_TIME_S = "training_time_s"  # warm-up + remaining steps; no evaluation, no search, no loading
TIME_WARMUP_S = "time_warmup_s"
TIME_TRAIN_S = "time_train_s"
TIME_EVAL_S = "time_eval_s"
TIME_SEARCH_S = "time_search_s"
CPU_TIME_S = "cpu_time_s"  # of this process in warm-up and remaining steps, over all its threads
LOAD_AVERAGE = "load_average"  # of the machine over the last minute, when the training ended; null where unknown
STEP_TIME_MEDIAN_S = "step_time_median_s"
PEAK_MEMORY_MIB = "peak_memory_mib"
TOTAL_STEPS = "total_steps"
PARAMS_ADAPTER = "params_adapter"  # trainable adapter parameters at the start
PARAMS_ADAPTER_FINAL = "params_adapter_final"  # those still in use at the end (AdaLoRA prunes)
PARAMS_HEAD = "params_head"
PARAMS_TRAINABLE = "params_trainable"
PARAMS_ENCODER = "params_encoder"
PARAMS_TOTAL = "params_total"
BUDGET_PARAMETERS = "budget_parameters"
ADAPTER_PERCENT_OF_ENCODER = "adapter_percent_of_encoder"  # from the final count
MODULE_NAMES = "module_names"  # the four lists are parallel, one entry per adapted module
MODULE_RANKS = "module_ranks"
MODULE_IMPORTANCES = "module_importances"  # null for methods that measure none
MODULE_DELTA_NORMS = "module_delta_norms"  # Frobenius norm of the update that the adapter makes
EVAL_PREDICTIONS = "eval_predictions"  # records.pack_values, in data-set order
EVAL_LABELS = "eval_labels"
EVAL_LOGITS = "eval_logits"  # records.pack_logits, in data-set order; null where predictions are numbers
EVAL_ECE = "eval_ece"  # expected calibration error; computed from the logits when runs are evaluated
ENCODER_FINGERPRINT = "encoder_fingerprint"  # hash of the pretrained weights
EVAL_FINGERPRINT = "eval_fingerprint"  # hash of the eval split's texts and labels

# Of the summary: times, and what depends on them or on other work of the machine; two runs of one command differ here.
VARYING = (
    TRAINING_TIME_S, TIME_WARMUP_S, TIME_TRAIN_S, TIME_EVAL_S, TIME_SEARCH_S, CPU_TIME_S, LOAD_AVERAGE,
    STEP_TIME_MEDIAN_S, PEAK_MEMORY_MIB,
)  # fmt: skip


def eval_name(task_metric: str) -> str:
    """``accuracy`` -> ``eval_accuracy``, the name in the per-epoch history."""
    return f"eval_{task_metric}"


def final_name(metric: str) -> str:
    """Summary name of the last epoch's value: the only one that is ever compared."""
    return f"final_{metric}"


def best_name(metric: str) -> str:
    """Summary name of the best epoch's value. It is selected on the reported split, so it is never compared."""
    return f"best_{metric}"


def best_epoch_name(metric: str) -> str:
    """Return the summary name of the epoch that had the best value."""
    return f"{best_name(metric)}_epoch"
