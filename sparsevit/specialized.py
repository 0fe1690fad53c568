"""A vector made permanent: a module of static shapes for compilers and exporters."""

from torch import Tensor, nn

from sparsevit.backbone import SparseSwin
from sparsevit.sparsity import SparsityVector
from sparsevit.windows import BlockPlan, StagePlan, WindowGrid


class SpecializedSwin(nn.Module):
    """A backbone at one sparsity vector and one image size.

    Everything that depends on them alone is a buffer or a constant, so that
    ``torch.compile(fullgraph=True)``, ``torch.export`` and ONNX export meet no Python that they
    cannot follow. The parameters are those of the backbone, not copies.

    Args:
        backbone: its parameters and options.
        sparsity: the vector.
        image_size: height and width in pixels.

    Raises:
        ValueError: if the vector does not fit the backbone, or the size is smaller than a patch.
    """

    def __init__(self, backbone: SparseSwin, sparsity: SparsityVector, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.training = backbone.training
        self.backbone = backbone
        self.sparsity = sparsity
        self.image_size = image_size
        device = next(backbone.parameters()).device
        self._steps: list[list[tuple[str, int | None]]] = []
        self._num_tokens: dict[str, int] = {}
        for stage, plan in enumerate(backbone.plan(sparsity, image_size, device)):
            steps = []
            for block, step in enumerate(plan):
                name = f"stage{stage}_{'shifted' if block % 2 else 'regular'}"
                if name not in self._num_tokens:
                    self._register(name, step.grid)
                steps.append((name, step.num_kept))
            self._steps.append(steps)

    def forward(self, images: Tensor) -> list[Tensor]:
        """One feature map per stage, as the backbone gives them.

        Args:
            images: [B, 3, h, w] of the size that was given.

        Raises:
            ValueError: for images of another size.
        """
        if tuple(images.shape[1:]) != (3, *self.image_size):
            raise ValueError(
                f"specialized to images [B, 3, {self.image_size[0]}, {self.image_size[1]}], got "
                f"{list(images.shape)}: specialize again for another size"
            )
        grids = {name: self._grid(name) for name in self._num_tokens}
        plans: list[StagePlan] = [
            tuple(BlockPlan(grids[name], num_kept) for name, num_kept in steps) for steps in self._steps
        ]
        return self.backbone.run(images, plans)

    def _register(self, name: str, grid: WindowGrid) -> None:
        self._num_tokens[name] = grid.num_tokens
        tables = {
            "tokens": grid.tokens_MN,
            "is_padding": grid.is_padding_MN,
            "positions": grid.positions_L,
            "mask_type": grid.mask_type_M,
            "mask": grid.mask_TNN,
            "bias_row": grid.bias_row_NN,
        }
        for key, table in tables.items():
            if table is not None:  # torch.export miscounts buffers that are None
                self.register_buffer(f"{name}_{key}", table, persistent=False)

    def _grid(self, name: str) -> WindowGrid:
        return WindowGrid(
            tokens_MN=self.get_buffer(f"{name}_tokens"),
            is_padding_MN=self._optional(f"{name}_is_padding"),
            positions_L=self._optional(f"{name}_positions"),
            mask_type_M=self.get_buffer(f"{name}_mask_type"),
            mask_TNN=self._optional(f"{name}_mask"),
            bias_row_NN=self.get_buffer(f"{name}_bias_row"),
            num_tokens=self._num_tokens[name],
        )

    def _optional(self, name: str) -> Tensor | None:
        return self.get_buffer(name) if name in self._buffers else None
