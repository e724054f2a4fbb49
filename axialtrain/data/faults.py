"""What `verify` finds: a fault, its place, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass, field

from axialtrain.data.checked import shown

MAX_FAULTS = 100  # of a shard that are kept; more are only counted

COPY = "copy this shard again from where it is whole, or shard its images again"
COPY_EITHER = "copy this shard and the manifest again from where both are whole"
MADE_SO = "it was written so: shard the image again, from a source that you trust"


@dataclass(frozen=True)
class Fault:
    """One fault of a set of shards.

    url: the folder. shard: the file in it, None where no single one is at fault. offset: bytes
    into the shard. member: as the tar names it; image: as the manifest does. remedy: what to do.
    """

    url: str
    shard: str | None
    what: str
    remedy: str
    offset: int | None = None
    member: str | None = None
    image: str | None = None

    def __str__(self) -> str:
        place = [self.url if self.shard is None else f"{self.url}/{self.shard}"]
        if self.offset is not None:
            place.append(f"byte {self.offset}")
        if self.member is not None:
            place.append(f"member {shown(self.member)}")
        elif self.image is not None:
            place.append(f"image {self.image!r}")
        return f"{': '.join(place)}: {self.what}: {self.remedy}"


@dataclass
class Faults:
    """Those of one shard, or of none in particular: up to MAX_FAULTS, and how many there were."""

    url: str
    shard: str | None
    kept: list[Fault] = field(default_factory=list)
    count: int = 0

    def add(
        self,
        what: str,
        remedy: str = COPY,
        *,
        offset: int | None = None,
        member: str | None = None,
        image: str | None = None,
    ) -> None:
        self.count += 1
        if len(self.kept) < MAX_FAULTS:
            fault = Fault(self.url, self.shard, what, remedy, offset, member, image)
            self.kept.append(fault)
