"""Broken generators: how they begin and end."""

from __future__ import annotations

from pathlib import Path

from rlbridge.errors import ModelError, SyncError
from rlbridge.roles.generator import GeneratorContext
from rlbridge_conformance.broken.catalogue import broken
from rlbridge_conformance.reference.generator import ReferenceGenerator
from rlbridge_conformance.reference.options import ReferenceGeneratorOptions

_DIRECTORY = "contract.a_directory_without_a_model_is_refused"


@broken("generator", check="contract.the_model_directory_is_left_alone")
class WritesBesideTheModel(ReferenceGenerator):
    """Leaves a file in the model directory."""

    def setup(self, context: GeneratorContext, options: ReferenceGeneratorOptions) -> None:
        super().setup(context, options)
        (Path(context.model_path) / "cache").touch()


@broken("generator", check=_DIRECTORY)
class NamesNoDirectory(ReferenceGenerator):
    """Does not say which model cannot be loaded."""

    def setup(self, context: GeneratorContext, options: ReferenceGeneratorOptions) -> None:
        try:
            super().setup(context, options)
        except ModelError as error:
            raise ModelError("the model cannot be loaded") from error


@broken("generator", check=_DIRECTORY)
class BeginsWithoutAModel(ReferenceGenerator):
    """Says nothing of a directory without a model."""

    def setup(self, context: GeneratorContext, options: ReferenceGeneratorOptions) -> None:
        try:
            super().setup(context, options)
        except ModelError:
            self.context = context


@broken("generator", check="contract.an_engine_can_be_closed")
class CannotBeClosed(ReferenceGenerator):
    """Raises when it is to be closed after an epoch."""

    def close(self) -> None:
        super().close()
        if self.version:
            raise SyncError("the epoch has ended already")
