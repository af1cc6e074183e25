"""The ops that look at samples together, over the samples of every rank of a `torch.distributed` group.

Every rank of the group calls the function with its own rows. Row counts may differ, and a rank may have none. The
result is what one process would compute on the concatenation of all rows, in the order of the ranks. `group` None
means the default group.

**What a loss means.** Every rank calls backward on its own loss. A rank's rows get the gradient of the *sum* of all
ranks' losses, as if one process had added them. DistributedDataParallel divides by the number of ranks, so training
lowers the *mean* of the ranks' losses. A global scalar, which every rank returns, therefore counts once, and so does
the mean over a rank's own rows if counts are equal. Without DDP, divide by the number of ranks. Backward communicates
too: every rank must call it, in the same order.

**exchange**: "gather" sends all rows to every rank, which runs the single-process op on them: results are bitwise
equal to a single process, memory is O(n d), and every rank does all of the work. "ring" passes blocks from rank to rank
while the previous block is processed: memory is O(n_rank d), and each rank does its share, in streamed PyTorch.
Gradients take a second round, or for MMD the same one. "auto" gathers up to 16384 rows in total.

**Far-apart samples.** A ring computes squared distances from products of centred rows, in float32 for float32 and half
precision. Where these would lose the distances that matter (those of the bandwidth's size) on any rank, because samples
are far apart beside them or beyond the range of squares, all ranks take float64 and differences, which is several times
slower and sends twice the bytes; sums then carry float64's rounding of the largest coordinate. This check synchronises
with the device. Infinite samples give NaN.
The ring of `as_distance` computes in float64 always.

**even**: set it if all ranks hold the same number of rows. Otherwise each call exchanges the counts, which waits for
the device, and raises on all ranks if the arguments of one do not fit.
"""

from .divergences import as_distance, fld, importance_weighted_loss, mmd, multi_js_loss
from .exchange import Rows, gather_rows, rows_of
from .stein import median_bandwidth, svgd_bridge, svgd_direction

__all__ = [
    "Rows",
    "as_distance",
    "fld",
    "gather_rows",
    "importance_weighted_loss",
    "median_bandwidth",
    "mmd",
    "multi_js_loss",
    "rows_of",
    "svgd_bridge",
    "svgd_direction",
]
