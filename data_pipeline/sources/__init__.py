"""Raw logs: one module per format. `open_source` makes the one a config names."""

from typing import Annotated

from pydantic import Field

from data_pipeline.sources.amazon import AmazonConfig, AmazonSource
from data_pipeline.sources.base import Source
from data_pipeline.sources.complete_journey import CompleteJourneyConfig, CompleteJourneySource
from data_pipeline.sources.files import FilesConfig, FilesSource
from data_pipeline.sources.llmrank import LLMRankConfig, LLMRankSource
from data_pipeline.sources.movielens import MovieLensConfig, MovieLensSource

SourceConfig = Annotated[FilesConfig | CompleteJourneyConfig | MovieLensConfig | AmazonConfig | LLMRankConfig,
                         Field(discriminator="format")]

_SOURCES = {FilesConfig: FilesSource, CompleteJourneyConfig: CompleteJourneySource, MovieLensConfig: MovieLensSource,
            AmazonConfig: AmazonSource, LLMRankConfig: LLMRankSource}


def open_source(config: SourceConfig) -> Source:
    """Raises: DataError when the source's files or package are missing."""
    return _SOURCES[type(config)](config)
