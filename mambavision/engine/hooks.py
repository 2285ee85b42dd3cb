"""Checkpoint writing that survives a kill at any moment."""

import os
import os.path as osp
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS


@register_backend("atomic_local", force=True)
class AtomicLocalBackend(LocalBackend):
    """mmengine's local files, with every write whole or absent: temporary file, fsync, rename."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes to a file; a reader sees the old content or the new one, never a part."""
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.unfinished")
        with open(unfinished, "wb") as file:
            file.write(obj)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        """Write text to a file, whole or not at all."""
        self.put(obj.encode(encoding), filepath)


class _PostponingBackend(AtomicLocalBackend):
    """Only notes what `remove` is asked for."""

    def __init__(self) -> None:
        self.outdated: set[str] = set()

    def remove(self, filepath: str | Path) -> None:
        self.outdated.add(str(filepath))


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """CheckpointHook that keeps a loadable latest checkpoint at every moment, also through `kill -9`.

    A file is complete before it has its name, `last_checkpoint` changes after the file that it names is complete, and
    outdated or no longer best checkpoints are deleted last (a kill before that leaves them behind). Arguments are those
    of mmengine's CheckpointHook without `backend_args` and `file_client_args`: local folders only.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs, backend_args={"backend": "atomic_local"})

    def before_train(self, runner) -> None:
        super().before_train(runner)
        self.file_backend = _PostponingBackend()

    def after_train_epoch(self, runner) -> None:
        super().after_train_epoch(runner)
        self._remove_outdated()

    def after_train_iter(self, runner, *args, **kwargs) -> None:
        super().after_train_iter(runner, *args, **kwargs)
        self._remove_outdated()

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        super().after_val_epoch(runner, metrics)
        self._remove_outdated()

    def _save_checkpoint_with_step(self, runner, step: int, meta: dict) -> None:
        # mmengine's own, but for its plain write of last_checkpoint
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts and is_main_process():
                self.file_backend.remove(osp.join(self.out_dir, self.filename_tmpl.format(self.keep_ckpt_ids[0])))
            self.keep_ckpt_ids.append(step)  # a deque of max_keep_ckpts: drops its first
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        name = self.filename_tmpl.format(step)
        self.last_ckpt = osp.join(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            self.file_backend.put_text(self.last_ckpt, osp.join(runner.work_dir, "last_checkpoint"))

    def _remove_outdated(self) -> None:
        best = {getattr(self, "best_ckpt_path", None), *getattr(self, "best_ckpt_path_dict", {}).values()}
        for path in self.file_backend.outdated - best - {self.last_ckpt}:
            Path(path).unlink(missing_ok=True)
        self.file_backend.outdated.clear()
