"""Where the host may wait for the device: what is not here is a fault.

Of how often, one thing is tested, for the passes of an evaluation: whether it grows with the number
of batches. The rest of it is what the reader of a line should know.
"""

from __future__ import annotations

from collections.abc import Mapping

ONCE = "once a run, a network or a request"
EPOCH = "once a pass over the training images, or between two"
SAVE = "once a tensor of a state that is saved or compared"
PASS = "once a column of a pass over a set"
TILE = "once a tile of many rows"
BATCH = "once a batch, before the first step or in an attack: of images that come or go"
STEP = "each step of a short training on images of the host"
SOLVER = "each round of a solver that stops by what it finds"
PLACES: dict[str, str] = {
    "engine/health.py:check_finite": EPOCH,
    "engine/health.py:measure_pair": ONCE,
    "engine/loop.py:_place": EPOCH,
    "engine/memory/sample_rows.py:SampleRows.share": ONCE,
    "engine/memory/sharding.py:whole_copy": ONCE,
    "engine/memory/shards.py:copy_to_first": SAVE,
    "engine/models/initial.py:initial_copy": ONCE,
    "engine/numbers/sweep.py:batches": PASS,
    "engine/numbers/tally.py:Tally.record": EPOCH,
    "engine/passes/one_pass.py:_close": EPOCH,
    "engine/statistics.py:_class_covariances": BATCH,
    "eval/attacks/inputs.py:prompt": STEP,
    "eval/attacks/inputs.py:push": STEP,
    "eval/attacks/suite.py:attack": STEP,
    "eval/attacks/weights.py:answer": BATCH,
    "eval/evaluate.py:read_images": BATCH,
    "eval/inference/extract.py:_on_host": PASS,
    "eval/metrics/cka.py:Centered.chunk": TILE,
    "eval/metrics/cka.py:_constant": TILE,
    "eval/metrics/cka.py:_energy": TILE,
    "eval/metrics/cka.py:_sum": TILE,
    "eval/metrics/cka.py:center": TILE,
    "eval/metrics/confusion.py:by_neighbors": PASS,
    "eval/metrics/knn.py:knn": PASS,
    "eval/probes/critic.py:critic_information": STEP,
    "eval/probes/relearn.py:feature_batches": STEP,
    "eval/probes/relearn.py:find_rate": STEP,
    "eval/probes/relearn.py:relearn": STEP,
    "eval/probes/relearn_evaluator.py:_curve": STEP,
    "eval/probes/relearn_evaluator.py:_features": BATCH,
    "eval/probes/relearn_evaluator.py:curves": ONCE,
    "eval/probes/relearn_evaluator.py:rate_of": STEP,
    "eval/search/neighbors.py:_local": PASS,
    "eval/search/neighbors.py:_order_ranges": TILE,
    "eval/search/neighbors.py:_rescore": TILE,
    "eval/search/neighbors.py:nearest_sets": PASS,
    "eval/search/scores.py:Scores.__init__": PASS,
    "eval/search/scores.py:Scores.center_rows": TILE,
    "eval/search/scores.py:Scores.fast": TILE,
    "kernels/threshold.py:thresholds_by_sort": ONCE,
    "loaders/backends/resident_loader.py:_load_pixels": ONCE,
    "loaders/transforms/normalize.py:moments": ONCE,
    "methods/amun.py:Amun._fool": BATCH,
    "methods/boundary_shrink.py:BoundaryShrink.phases": EPOCH,
    "methods/distillation.py:class_mask": ONCE,
    "methods/duck.py:Duck.prepare": ONCE,
    "methods/duck.py:nearest_others": ONCE,
    "methods/fisher.py:Fisher.prepare": ONCE,
    "methods/head_distillation.py:HeadDistillation.phases": EPOCH,
    "methods/influence.py:Influence.prepare": ONCE,
    "methods/influence.py:_recurse": BATCH,
    "methods/influence.py:conjugate_gradients": SOLVER,
    "methods/l2ul.py:L2ul._attack": BATCH,
    "methods/lotus.py:Lotus.prepare": ONCE,
    "methods/random_label.py:RandomLabel.prepare": ONCE,
    "methods/scar.py:Scar.prepare": ONCE,
    "methods/sfron.py:Sfron.prepare": ONCE,
    "methods/ssd.py:Ssd.prepare": ONCE,
    "methods/unsir.py:Unsir.prepare": ONCE,
}
"""file:function -> how often it waits. The step of a training is not here: it never does."""


def find_undeclared(waits: Mapping[str, int]) -> list[str]:
    """List the waits of functions of ours that are not among `PLACES`, as `Ledger.waits` has them.

    What no function of ours asked for, such as a test's own look, is left out.
    """
    return sorted(one for one in waits if ".py:" in one and one.split(" ")[0] not in PLACES)


def find_growing(few: Mapping[str, int], many: Mapping[str, int]) -> list[str]:
    """List the waits that are more in `many` batches of the same images than in `few`.

    Those that `PLACES` has as of each batch or step are left out.
    """
    grows = {place for place, often in PLACES.items() if often in (BATCH, STEP)}
    return sorted(
        one for one in many
        if ".py:" in one and many[one] > few.get(one, 0) and one.split(" ")[0] not in grows
    )  # fmt: skip
