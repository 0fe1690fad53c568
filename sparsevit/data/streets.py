"""Street-like scenes in the layout of Cityscapes, drawn by this module.

They give the embedded scale of semantic segmentation something to learn within minutes: a road
with sidewalks that runs to a horizon, buildings with windows, trees, poles, cars and people in
perspective, far to near. The pixels are a function of the seed.

Legend: H, W size of a frame; depth runs from 0 at the horizon to 1 at the lower edge.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sparsevit.data.cityscapes import IMAGE_SUFFIX, LABEL_IDS, LABEL_SUFFIX
from sparsevit.data.generated import write_generated

EGO_VEHICLE = 1  # a label id that is not evaluated
CITY = "street"
Box = tuple[float, float, float, float]
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class StreetsConfig:
    """What to draw; every split has its own stream of random numbers. `image_size` is height, width."""

    image_size: tuple[int, int] = (192, 384)
    num_images: Mapping[str, int] = field(default_factory=lambda: {"train": 900, "search": 40, "val": 80})
    seed: int = 0


def write_streets(root: Path, config: StreetsConfig, on_image: Callable[[], None] = lambda: None) -> None:
    """Write all splits below `root`, unless they are there already."""

    def write_split(folder: Path, split: str, rng: np.random.Generator) -> None:
        photos, labels = (folder / kind / split / CITY for kind in ("leftImg8bit", "gtFine"))
        for place in (photos, labels):
            place.mkdir(parents=True)
        for number in range(config.num_images[split]):
            frame = f"{CITY}_{number:06d}_000000"
            pixels, label_ids = draw_street(config.image_size, rng)
            Image.fromarray(pixels).save(photos / f"{frame}{IMAGE_SUFFIX}", compress_level=1)
            Image.fromarray(label_ids).save(labels / f"{frame}{LABEL_SUFFIX}")
            on_image()

    write_generated(root, __name__, config, write_split)


def draw_street(
    image_size: tuple[int, int], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one frame: pixels [H, W, 3] and label ids [H, W]."""
    scene = _Scene(image_size, rng)
    scene.draw_ground()
    for side in (-1, 1):
        scene.draw_buildings(side)
    depths = np.sort(rng.uniform(0.05, 0.85, int(rng.integers(9, 16))))
    for depth in depths:
        kind = rng.choice(4, p=(0.22, 0.28, 0.28, 0.22))
        (scene.draw_tree, scene.draw_pole, scene.draw_car, scene.draw_person)[kind](float(depth))
    if rng.random() < 0.3:
        scene.draw_hood()
    return scene.finish()


class _Scene:
    """A picture and its labels, drawn together."""

    def __init__(self, image_size: tuple[int, int], rng: np.random.Generator) -> None:
        self.height, self.width = image_size
        self.rng = rng
        self.picture = Image.new("RGB", (self.width, self.height))
        self.labels = Image.new("L", (self.width, self.height))
        self._pens = ImageDraw.Draw(self.picture), ImageDraw.Draw(self.labels)
        self.horizon = rng.uniform(0.38, 0.5) * self.height
        self.vanishing = rng.uniform(0.4, 0.6) * self.width
        self.half_road = rng.uniform(0.45, 0.65) * self.width  # at the lower edge
        self.half_street = self.half_road * rng.uniform(1.25, 1.5)  # sidewalks included

    def at(self, offset: float, depth: float) -> tuple[float, float]:
        """The pixel of a point on the ground: sideways from the middle of the road, at a depth."""
        return self.vanishing + offset * depth, self.horizon + (self.height - self.horizon) * depth

    def draw_ground(self) -> None:
        """Sky, sidewalks, road and its marks."""
        top = self._colour((90, 130, 190), 30)
        for row in range(int(self.horizon) + 1):
            fade = row / self.horizon
            shade = tuple(int(channel + (225 - channel) * 0.8 * fade) for channel in top)
            self._pens[0].line((0, row, self.width, row), fill=shade)
        self._pens[1].rectangle((0, 0, self.width, self.horizon), fill=LABEL_IDS["sky"])
        floor = (0, self.horizon, self.width, self.height)
        self._shape("rectangle", floor, self._colour((150, 140, 130), 20), "sidewalk")
        for half, name, base in (
            (self.half_street, "sidewalk", (165, 155, 150)),
            (self.half_road, "road", (85, 85, 90)),
        ):
            corners = [self.at(0, 0), self.at(-half, 1), self.at(half, 1)]
            self._shape("polygon", corners, self._colour(base, 15), name)
        for start in np.arange(0.08, 1.0, 0.16):
            left, right = (self.at(side * 0.012 * self.width, start) for side in (-1, 1))
            far, near = (self.at(side * 0.012 * self.width, start + 0.07) for side in (1, -1))
            self._pens[0].polygon([left, right, far, near], fill=(215, 215, 205))

    def draw_buildings(self, side: int) -> None:
        """A row of houses along one sidewalk, from the horizon towards the viewer."""
        depth = 0.06
        while depth < 0.9:
            nearer = min(0.95, depth + self.rng.uniform(0.1, 0.3))
            if self.rng.random() < 0.8:
                self._draw_building(side, depth, nearer)
            depth = nearer

    def _draw_building(self, side: int, depth: float, nearer: float) -> None:
        height = self.rng.uniform(0.6, 1.7) * self.height
        (x0, y0), (x1, y1) = (self.at(side * self.half_street, each) for each in (depth, nearer))
        walls = [(x0, y0 - height * depth), (x1, y1 - height * nearer), (x1, y1), (x0, y0)]
        colour = self._colour((140, 110, 95), 45)
        self._shape("polygon", walls, colour, "building")
        dark = tuple(int(channel * 0.5) for channel in colour)
        for floor in np.arange(0.15, 0.95, 0.2):
            for column in np.arange(0.12, 0.9, 0.25):
                window = []
                for u, v in ((0, 0), (0.14, 0), (0.14, 0.1), (0, 0.1)):
                    share = column + u
                    x = x0 + (x1 - x0) * share
                    base = y0 + (y1 - y0) * share
                    tall = height * (depth + (nearer - depth) * share)
                    window.append((x, base - tall * (floor + v)))
                self._pens[0].polygon(window, fill=dark)

    def draw_tree(self, depth: float) -> None:
        x, y = self.at(self._beside(), depth)
        size = self.height * self.rng.uniform(0.5, 0.8) * depth
        trunk = (x - 0.05 * size, y - 0.6 * size, x + 0.05 * size, y)
        self._shape("rectangle", trunk, self._colour((90, 65, 45), 10), "vegetation")
        for _ in range(7):
            dx, dy = self.rng.normal(0, 0.16 * size, 2)
            radius = self.rng.uniform(0.14, 0.26) * size
            centre = x + dx, y - 0.85 * size + dy
            crown = (centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius)
            self._shape("ellipse", crown, self._colour((55, 105, 45), 25), "vegetation")

    def draw_pole(self, depth: float) -> None:
        side = self.rng.choice((-1, 1))
        x, y = self.at(side * self.half_road * self.rng.uniform(1.04, 1.15), depth)
        size = self.height * self.rng.uniform(0.8, 1.1) * depth
        half = max(1.0, 0.022 * size)
        self._shape("rectangle", (x - half, y - size, x + half, y), self._colour((60, 60, 62), 20), "pole")

    def draw_car(self, depth: float) -> None:
        x, y = self.at(self.half_road * self.rng.uniform(-0.8, 0.8), depth)
        size = self.height * self.rng.uniform(0.42, 0.55) * depth
        colour = self._colour((130, 60, 70), 100)
        body = (x - 0.65 * size, y - 0.55 * size, x + 0.65 * size, y - 0.1 * size)
        cabin = [
            (x - 0.5 * size, y - 0.5 * size), (x - 0.36 * size, y - size),
            (x + 0.36 * size, y - size), (x + 0.5 * size, y - 0.5 * size),
        ]  # fmt: skip
        self._shape("polygon", cabin, colour, "car")
        self._shape("rectangle", body, colour, "car")
        glass = [(px + (x - px) * 0.25, py + 0.07 * size) for px, py in cabin]
        self._pens[0].polygon(glass, fill=(40, 50, 60))
        for side in (-1, 1):
            wheel = x + side * 0.42 * size
            tyre = (wheel - 0.14 * size, y - 0.26 * size, wheel + 0.14 * size, y)
            self._shape("ellipse", tyre, (22, 22, 24), "car")
            lamp = x + side * 0.52 * size
            self._pens[0].rectangle(
                (lamp - 0.06 * size, y - 0.42 * size, lamp + 0.06 * size, y - 0.32 * size), fill=(230, 60, 50)
            )

    def draw_person(self, depth: float) -> None:
        x, y = self.at(self._beside(), depth)
        size = self.height * self.rng.uniform(0.45, 0.55) * depth
        head = 0.1 * size
        shirt, trousers = self._colour((150, 70, 60), 90), self._colour((50, 55, 90), 35)
        for side in (-1, 1):
            foot = x + side * 0.08 * size
            leg = (foot - 0.06 * size, y - 0.48 * size, foot + 0.06 * size, y)
            self._shape("rectangle", leg, trousers, "person")
        torso = (x - 0.16 * size, y - 0.84 * size, x + 0.16 * size, y - 0.42 * size)
        self._shape("ellipse", torso, shirt, "person")
        face = (x - head, y - size, x + head, y - 0.8 * size)
        self._shape("ellipse", face, self._colour((205, 160, 130), 30), "person")

    def draw_hood(self) -> None:
        """The own car at the lower edge, which is not evaluated."""
        edge = (0.2 * self.width, 0.94 * self.height, 0.8 * self.width, 1.1 * self.height)
        self._pens[0].ellipse(edge, fill=(30, 32, 36))
        self._pens[1].ellipse(edge, fill=EGO_VEHICLE)

    def finish(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Light, coarse mottling and noise over everything."""
        pixels = np.asarray(self.picture, dtype=np.float32)
        coarse = self.rng.normal(0, 1, (self.height // 8, self.width // 8)).astype(np.float32)
        mottling = np.asarray(Image.fromarray(coarse).resize((self.width, self.height)))[..., None]
        noise = self.rng.normal(0, 4, pixels.shape)
        lit = pixels * np.float32(self.rng.uniform(0.75, 1.2)) + 5 * mottling + noise
        return np.clip(lit, 0, 255).astype(np.uint8), np.asarray(self.labels).copy()

    def _beside(self) -> float:
        """Sideways onto one of the sidewalks."""
        side = float(self.rng.choice((-1, 1)))
        return side * self.rng.uniform(1.05, self.half_street / self.half_road) * self.half_road

    def _colour(self, base: Colour, spread: int) -> Colour:
        red, green, blue = (
            int(np.clip(channel + self.rng.integers(-spread, spread + 1), 0, 255)) for channel in base
        )
        return red, green, blue

    def _shape(self, kind: str, where: Box | list[tuple[float, float]], colour: Colour, name: str) -> None:
        """Draw the same shape into the picture and, with its class, into the labels."""
        for pen, fill in zip(self._pens, (colour, LABEL_IDS[name]), strict=True):
            getattr(pen, kind)(where, fill=fill)
