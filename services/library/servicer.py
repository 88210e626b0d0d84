"""The library's API over gRPC."""

from __future__ import annotations

from typing import Any

from connito.store import ArtifactStore
from connito.v1 import services_pb2, services_pb2_grpc

from services.library.projection import Catalogue


class Library(services_pb2_grpc.LibraryServiceServicer):
    """Reads only: everything written comes out of runs."""

    def __init__(self, catalogue: Catalogue, store: ArtifactStore) -> None:
        self._catalogue, self._store = catalogue, store

    async def GetExpert(  # noqa: N802 - the name in the proto
        self, request: services_pb2.GetExpertRequest, context: Any
    ) -> services_pb2.GetExpertResponse:
        """One expert with its record. `NotFound` for an unknown id, `Retry` when the store is away."""
        expert = self._catalogue.get(request.expert_id)
        record = await self._store.get_bytes(expert.record)
        return services_pb2.GetExpertResponse(expert=expert, record_json=record.decode())

    async def ListExperts(  # noqa: N802
        self, request: services_pb2.ListExpertsRequest, context: Any
    ) -> services_pb2.ListExpertsResponse:
        """A page of experts in the order of their deposit. `Invalid` for a foreign page token."""
        experts, token = self._catalogue.page(request.page_size, request.page_token)
        return services_pb2.ListExpertsResponse(experts=experts, next_page_token=token)
