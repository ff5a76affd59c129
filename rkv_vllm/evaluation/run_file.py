"""What a run is, in a file beside its answers, so that it goes on as the same run or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict


class RunSettings(BaseModel):
    """All that every answer of a run has in common. The grid of settings, the numbers of problems and
    samples, and a server's address may change when a run goes on.

    `engine`: `process` or `server`; `server_wide`: the R-KV settings that its requests share, where this run
    set them; `engine_arguments`: of vLLM, in order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None
    task: dict[str, Any]
    seed: int
    temperature: float
    top_p: float
    max_tokens: int | None
    chat: bool
    engine: str
    engine_arguments: list[str]
    server_wide: dict[str, Any]


class RunFile(BaseModel):
    """`commands`: all that have worked on the run; `full_length`: mean length with the full cache, in tokens,
    of which percentages are taken, once it is known."""

    model_config = ConfigDict(extra="forbid")

    settings: RunSettings
    commands: list[str] = []
    full_length: float | None = None

    @classmethod
    def begin(cls, path: Path, settings: RunSettings, command: str, *, goes_on: bool) -> RunFile:
        """Reads the run that is there, or makes a new one, and notes the command.

        Args:
            goes_on: whether there are answers of the run that is there.

        Raises: ValueError that names what differs from the run that is there; OSError where its file is gone.
        """
        run = cls.model_validate_json(path.read_text()) if goes_on else cls(settings=settings)
        was, asked = run.settings.model_dump(), settings.model_dump()
        if different := [
            f"{name} was {was[name]!r}, not {asked[name]!r}" for name in was if was[name] != asked[name]
        ]:
            raise ValueError(f"out: {path.parent} holds another run: {'; '.join(different)}")
        if command not in run.commands:
            run.commands.append(command)
        run.write(path)
        return run

    def write(self, path: Path) -> None:
        path.write_text(self.model_dump_json(indent=1) + "\n")
