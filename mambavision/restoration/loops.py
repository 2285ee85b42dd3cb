"""Training on endless crops."""

from mmengine.registry import LOOPS

from mambavision.engine.loops import PrefetchTrainLoop
from mambavision.restoration.batches import CropLoader


@LOOPS.register_module()
class CropTrainLoop(PrefetchTrainLoop):
    """Training on the batches of a :class:`~mambavision.restoration.batches.CropLoader`."""

    maker = CropLoader
