"""A method for each operation of the service, for both kinds of client.

Written by `make clients` from the OpenAPI document; do not edit."""

from __future__ import annotations

from typing import Any, Literal, Unpack

from streamrec.models import (
    BatchRequest,
    BatchResponse,
    CatalogueFilter,
    CatalogueItems,
    CataloguesResponse,
    ChangedItems,
    EventsRequest,
    EventsResponse,
    FeedbackRequest,
    FeedbackResponse,
    FeedbackSummaries,
    Item,
    ItemFields,
    ItemsPut,
    ItemsRequest,
    ItemsResponse,
    Model,
    ModelMetadata,
    ModelReady,
    ModelRequest,
    ModelsResponse,
    NamedCatalogue,
    NamedScenario,
    PopularResponse,
    RankRequest,
    RecommendRequest,
    RecommendResponse,
    Scenario,
    ScenariosResponse,
    ServerMetadata,
    SimilarResponse,
    TrafficBody,
    TrafficResponse,
    UserResponse,
)
from streamrec.transport import AsyncTransport, Transport, segment


class Operations(Transport):
    """What the service can be asked."""

    def recommend(
        self, /, *, reasoning_steps: int | Literal["auto"] | None = None, **body: Unpack[RecommendRequest]
    ) -> RecommendResponse:
        """The best items for one user, after a number of reasoning steps."""
        answer: RecommendResponse = self._call(
            "POST", "/recommend", query={"reasoning_steps": reasoning_steps}, body=body, is_repeatable=True
        )
        return answer

    def rank(
        self, /, *, reasoning_steps: int | Literal["auto"] | None = None, **body: Unpack[RankRequest]
    ) -> RecommendResponse:
        """Given items in the order in which one user wants them, the best first, with the scores that `/recommend`
        gives them. For retrieval by something else: nothing is searched for, and no item is left out, however unlikely
        it is. A user of whom nothing is known gets them by popularity."""
        answer: RecommendResponse = self._call(
            "POST", "/rank", query={"reasoning_steps": reasoning_steps}, body=body, is_repeatable=True
        )
        return answer

    def recommend_batch(
        self, /, *, reasoning_steps: int | Literal["auto"] | None = None, **body: Unpack[BatchRequest]
    ) -> BatchResponse:
        """Many requests in one call; each gets its own answer or its own problem details."""
        answer: BatchResponse = self._call(
            "POST", "/recommend/batch", query={"reasoning_steps": reasoning_steps}, body=body, is_repeatable=True
        )
        return answer

    def list_scenarios(self, /) -> ScenariosResponse:
        """List Scenarios"""
        answer: ScenariosResponse = self._call("GET", "/scenarios", is_repeatable=True)
        return answer

    def append_events(self, user_id: str, /, **body: Unpack[EventsRequest]) -> EventsResponse:
        """Append items to the user's history. Acknowledged only once stored; after a 503, check whether they were."""
        answer: EventsResponse = self._call("POST", f"/users/{segment(user_id)}/events", body=body)
        return answer

    def read_user(self, user_id: str, /) -> UserResponse:
        """Everything that is kept about a user. This looks through the feedback of all users: ask when somebody wants
        to know what is kept of them, not for every page."""
        answer: UserResponse = self._call("GET", f"/users/{segment(user_id)}", is_repeatable=True)
        return answer

    def erase_user(self, user_id: str, /) -> None:
        """Erase everything kept about a user, known history, encoded histories, feedback and impressions: in Redis and
        files at once, in other processes within moments. After a 503 something may be left: send the request again."""
        self._call("DELETE", f"/users/{segment(user_id)}", is_repeatable=True)

    def give_feedback(self, /, **body: Unpack[FeedbackRequest]) -> FeedbackResponse:
        """Report what somebody did with a recommended item. Acknowledged only once stored, and counted once however
        often it is sent: after a 503, send it again."""
        answer: FeedbackResponse = self._call("POST", "/feedback", body=body, is_repeatable=True)
        return answer

    def summarise_feedback(self, /) -> FeedbackSummaries:
        """Hit rate and click-through rate by model, source and reasoning steps, with intervals: of all workers of this
        replica, since its start. Prometheus has the counters, of all replicas and any time."""
        answer: FeedbackSummaries = self._call("GET", "/feedback/summary", is_repeatable=True)
        return answer

    def find_items(self, /, *, query: str | None = None, limit: int | None = None) -> ItemsResponse:
        """Items whose title contains every word of the query, most popular first; without a query, all items."""
        answer: ItemsResponse = self._call("GET", "/items", query={"query": query, "limit": limit}, is_repeatable=True)
        return answer

    def put_items(self, /, **body: Unpack[ItemsRequest]) -> ItemsPut:
        """Add or change many items, with one result for each, in their order."""
        answer: ItemsPut = self._call("POST", "/items", body=body)
        return answer

    def similar_items(
        self,
        item_id: str,
        /,
        *,
        k: int | None = None,
        by: Literal["together"] | Literal["content"] | None = None,
        allow: list[str] | None = None,
        deny: list[str] | None = None,
        categories: list[str] | None = None,
        catalogue: str | None = None,
        filter: str | None = None,
    ) -> SimilarResponse:
        """Items for the page of another one: what users took together with it, and what is like it by its content,
        which needs no user to have seen either."""
        answer: SimilarResponse = self._call(
            "GET",
            f"/items/{segment(item_id)}/similar",
            query={
                "k": k,
                "by": by,
                "allow": allow,
                "deny": deny,
                "categories": categories,
                "catalogue": catalogue,
                "filter": filter,
            },
            is_repeatable=True,
        )
        return answer

    def read_item(self, item_id: str, /) -> Item:
        """Read Item"""
        answer: Item = self._call("GET", f"/items/{segment(item_id)}", is_repeatable=True)
        return answer

    def put_item(self, item_id: str, /, **body: Unpack[ItemFields]) -> Item:
        """Add an item, or change one: what is left out is emptied. A new item gets a semantic ID from its text, which
        it keeps. Acknowledged once stored, and it can be recommended from then on; after a 503, look whether it is
        there."""
        answer: Item = self._call("PUT", f"/items/{segment(item_id)}", body=body, is_repeatable=True)
        return answer

    def delete_item(self, item_id: str, /) -> None:
        """Take an item out of every answer. Histories may go on to name it, and it can be put again."""
        self._call("DELETE", f"/items/{segment(item_id)}", is_repeatable=True)

    def popular(
        self,
        /,
        *,
        k: int | None = None,
        window: Literal["hour"] | Literal["day"] | Literal["week"] | Literal["month"] | None = None,
        allow: list[str] | None = None,
        deny: list[str] | None = None,
        categories: list[str] | None = None,
        catalogue: str | None = None,
        filter: str | None = None,
    ) -> PopularResponse:
        """Items with the most events lately, on histories and in feedback; an event counts less the older it is. Behind
        them, as far as k is not reached, what is popular in the bundle."""
        answer: PopularResponse = self._call(
            "GET",
            "/popular",
            query={
                "k": k,
                "window": window,
                "allow": allow,
                "deny": deny,
                "categories": categories,
                "catalogue": catalogue,
                "filter": filter,
            },
            is_repeatable=True,
        )
        return answer

    def trending(
        self,
        /,
        *,
        k: int | None = None,
        window: Literal["hour"] | Literal["day"] | Literal["week"] | None = None,
        allow: list[str] | None = None,
        deny: list[str] | None = None,
        categories: list[str] | None = None,
        catalogue: str | None = None,
        filter: str | None = None,
    ) -> PopularResponse:
        """Items with more events than their own past predicts, those furthest above it first. Fewer than k, if fewer
        rise."""
        answer: PopularResponse = self._call(
            "GET",
            "/trending",
            query={
                "k": k,
                "window": window,
                "allow": allow,
                "deny": deny,
                "categories": categories,
                "catalogue": catalogue,
                "filter": filter,
            },
            is_repeatable=True,
        )
        return answer

    def list_catalogues(self, /) -> CataloguesResponse:
        """List Catalogues"""
        answer: CataloguesResponse = self._call("GET", "/catalogues", is_repeatable=True)
        return answer

    def list_models(self, /) -> ModelsResponse:
        """The models that are loaded: version, what each number of reasoning steps gains and costs, as measured."""
        answer: ModelsResponse = self._call("GET", "/models", is_repeatable=True)
        return answer

    def add_model(self, /, **body: Unpack[ModelRequest]) -> Model:
        """Load a bundle beside the others: its hashes are checked, its answers compared with those of its export, its
        cost is measured. It answers nobody before it is activated or given traffic. Takes seconds to minutes."""
        answer: Model = self._call("POST", "/models", body=body)
        return answer

    def read_traffic(self, /) -> TrafficResponse:
        """Which model answers whom."""
        answer: TrafficResponse = self._call("GET", "/traffic", is_repeatable=True)
        return answer

    def direct_traffic(self, /, **body: Unpack[TrafficBody]) -> TrafficResponse:
        """Split the users over models and numbers of reasoning steps, in place of the split before. A user stays in an
        arm as long as `name` stays. Users whom no arm takes are answered by the active model. `shadow` searches for
        requests as well, and nobody gets its answers; metrics say how far they agree."""
        answer: TrafficResponse = self._call("PUT", "/traffic", body=body, is_repeatable=True)
        return answer

    def livez(self, /) -> Any:
        """503 once the engine is dead (ended, hung, or failing at everything): only a restart helps then."""
        answer: Any = self._call("GET", "/livez", is_repeatable=True)
        return answer

    def readyz(self, /) -> Any:
        """200 when requests are answered; else 503 with the reason: loading, warming, replaying (changes made before
        the start), draining or engine dead. With several workers, any of them reports for all that accept requests.
        `redis` says why Redis is not used, if it should be."""
        answer: Any = self._call("GET", "/readyz", is_repeatable=True)
        return answer

    def server_live(self, /) -> Any:
        """As `/livez`."""
        answer: Any = self._call("GET", "/v2/health/live", is_repeatable=True)
        return answer

    def server_ready(self, /) -> Any:
        """As `/readyz`."""
        answer: Any = self._call("GET", "/v2/health/ready", is_repeatable=True)
        return answer

    def server_metadata(self, /) -> ServerMetadata:
        """The name and version of this program."""
        answer: ServerMetadata = self._call("GET", "/v2", is_repeatable=True)
        return answer

    def model_ready(self, name: str, /) -> ModelReady:
        """Whether a bundle of this name is loaded. What is loaded has been warmed up."""
        answer: ModelReady = self._call("GET", f"/v2/models/{segment(name)}/ready", is_repeatable=True)
        return answer

    def model_metadata(self, name: str, /) -> ModelMetadata:
        """The loaded versions of a bundle, and what goes in and comes out; `/models` says more."""
        answer: ModelMetadata = self._call("GET", f"/v2/models/{segment(name)}", is_repeatable=True)
        return answer

    def activate_model(self, version: str, /) -> Model:
        """Answer by this model from now on, here at once and in other processes within seconds. Requests that have
        begun keep theirs. The model before stays loaded: activate it to roll back."""
        answer: Model = self._call("POST", f"/models/{segment(version)}/activate")
        return answer

    def retire_model(self, version: str, /) -> None:
        """Unload a model that is neither active nor given traffic. Its memory is free once its last request is
        answered."""
        self._call("DELETE", f"/models/{segment(version)}", is_repeatable=True)

    def name_catalogue(self, name: str, body: CatalogueItems | CatalogueFilter, /) -> NamedCatalogue:
        """A named subset of the items, which requests may choose: a list, or whatever passes a filter, now and as items
        and times change. One of the same name is replaced."""
        answer: NamedCatalogue = self._call("PUT", f"/catalogues/{segment(name)}", body=body, is_repeatable=True)
        return answer

    def list_changed_items(
        self,
        /,
        *,
        change: list[Literal["added"] | Literal["changed"] | Literal["removed"]] | None = None,
        after: int | None = None,
        limit: int | None = None,
    ) -> ChangedItems:
        """The items that changes have added, changed or removed so far, whoever made them, in every process the same.
        An item that changes again while you turn pages moves ahead of them; no page repeats another."""
        answer: ChangedItems = self._call(
            "GET", "/catalogues/changes", query={"change": change, "after": after, "limit": limit}, is_repeatable=True
        )
        return answer

    def put_scenario(self, name: str, /, **body: Unpack[Scenario]) -> NamedScenario:
        """Preset what requests leave out that name this scenario. One of the same name is replaced."""
        answer: NamedScenario = self._call("PUT", f"/scenarios/{segment(name)}", body=body, is_repeatable=True)
        return answer

    def delete_scenario(self, name: str, /) -> None:
        """From now on requests that name this scenario are refused."""
        self._call("DELETE", f"/scenarios/{segment(name)}", is_repeatable=True)


class AsyncOperations(AsyncTransport):
    """What the service can be asked, awaited."""

    async def recommend(
        self, /, *, reasoning_steps: int | Literal["auto"] | None = None, **body: Unpack[RecommendRequest]
    ) -> RecommendResponse:
        """The best items for one user, after a number of reasoning steps."""
        answer: RecommendResponse = await self._call(
            "POST", "/recommend", query={"reasoning_steps": reasoning_steps}, body=body, is_repeatable=True
        )
        return answer

    async def rank(
        self, /, *, reasoning_steps: int | Literal["auto"] | None = None, **body: Unpack[RankRequest]
    ) -> RecommendResponse:
        """Given items in the order in which one user wants them, the best first, with the scores that `/recommend`
        gives them. For retrieval by something else: nothing is searched for, and no item is left out, however unlikely
        it is. A user of whom nothing is known gets them by popularity."""
        answer: RecommendResponse = await self._call(
            "POST", "/rank", query={"reasoning_steps": reasoning_steps}, body=body, is_repeatable=True
        )
        return answer

    async def recommend_batch(
        self, /, *, reasoning_steps: int | Literal["auto"] | None = None, **body: Unpack[BatchRequest]
    ) -> BatchResponse:
        """Many requests in one call; each gets its own answer or its own problem details."""
        answer: BatchResponse = await self._call(
            "POST", "/recommend/batch", query={"reasoning_steps": reasoning_steps}, body=body, is_repeatable=True
        )
        return answer

    async def list_scenarios(self, /) -> ScenariosResponse:
        """List Scenarios"""
        answer: ScenariosResponse = await self._call("GET", "/scenarios", is_repeatable=True)
        return answer

    async def append_events(self, user_id: str, /, **body: Unpack[EventsRequest]) -> EventsResponse:
        """Append items to the user's history. Acknowledged only once stored; after a 503, check whether they were."""
        answer: EventsResponse = await self._call("POST", f"/users/{segment(user_id)}/events", body=body)
        return answer

    async def read_user(self, user_id: str, /) -> UserResponse:
        """Everything that is kept about a user. This looks through the feedback of all users: ask when somebody wants
        to know what is kept of them, not for every page."""
        answer: UserResponse = await self._call("GET", f"/users/{segment(user_id)}", is_repeatable=True)
        return answer

    async def erase_user(self, user_id: str, /) -> None:
        """Erase everything kept about a user, known history, encoded histories, feedback and impressions: in Redis and
        files at once, in other processes within moments. After a 503 something may be left: send the request again."""
        await self._call("DELETE", f"/users/{segment(user_id)}", is_repeatable=True)

    async def give_feedback(self, /, **body: Unpack[FeedbackRequest]) -> FeedbackResponse:
        """Report what somebody did with a recommended item. Acknowledged only once stored, and counted once however
        often it is sent: after a 503, send it again."""
        answer: FeedbackResponse = await self._call("POST", "/feedback", body=body, is_repeatable=True)
        return answer

    async def summarise_feedback(self, /) -> FeedbackSummaries:
        """Hit rate and click-through rate by model, source and reasoning steps, with intervals: of all workers of this
        replica, since its start. Prometheus has the counters, of all replicas and any time."""
        answer: FeedbackSummaries = await self._call("GET", "/feedback/summary", is_repeatable=True)
        return answer

    async def find_items(self, /, *, query: str | None = None, limit: int | None = None) -> ItemsResponse:
        """Items whose title contains every word of the query, most popular first; without a query, all items."""
        answer: ItemsResponse = await self._call(
            "GET", "/items", query={"query": query, "limit": limit}, is_repeatable=True
        )
        return answer

    async def put_items(self, /, **body: Unpack[ItemsRequest]) -> ItemsPut:
        """Add or change many items, with one result for each, in their order."""
        answer: ItemsPut = await self._call("POST", "/items", body=body)
        return answer

    async def similar_items(
        self,
        item_id: str,
        /,
        *,
        k: int | None = None,
        by: Literal["together"] | Literal["content"] | None = None,
        allow: list[str] | None = None,
        deny: list[str] | None = None,
        categories: list[str] | None = None,
        catalogue: str | None = None,
        filter: str | None = None,
    ) -> SimilarResponse:
        """Items for the page of another one: what users took together with it, and what is like it by its content,
        which needs no user to have seen either."""
        answer: SimilarResponse = await self._call(
            "GET",
            f"/items/{segment(item_id)}/similar",
            query={
                "k": k,
                "by": by,
                "allow": allow,
                "deny": deny,
                "categories": categories,
                "catalogue": catalogue,
                "filter": filter,
            },
            is_repeatable=True,
        )
        return answer

    async def read_item(self, item_id: str, /) -> Item:
        """Read Item"""
        answer: Item = await self._call("GET", f"/items/{segment(item_id)}", is_repeatable=True)
        return answer

    async def put_item(self, item_id: str, /, **body: Unpack[ItemFields]) -> Item:
        """Add an item, or change one: what is left out is emptied. A new item gets a semantic ID from its text, which
        it keeps. Acknowledged once stored, and it can be recommended from then on; after a 503, look whether it is
        there."""
        answer: Item = await self._call("PUT", f"/items/{segment(item_id)}", body=body, is_repeatable=True)
        return answer

    async def delete_item(self, item_id: str, /) -> None:
        """Take an item out of every answer. Histories may go on to name it, and it can be put again."""
        await self._call("DELETE", f"/items/{segment(item_id)}", is_repeatable=True)

    async def popular(
        self,
        /,
        *,
        k: int | None = None,
        window: Literal["hour"] | Literal["day"] | Literal["week"] | Literal["month"] | None = None,
        allow: list[str] | None = None,
        deny: list[str] | None = None,
        categories: list[str] | None = None,
        catalogue: str | None = None,
        filter: str | None = None,
    ) -> PopularResponse:
        """Items with the most events lately, on histories and in feedback; an event counts less the older it is. Behind
        them, as far as k is not reached, what is popular in the bundle."""
        answer: PopularResponse = await self._call(
            "GET",
            "/popular",
            query={
                "k": k,
                "window": window,
                "allow": allow,
                "deny": deny,
                "categories": categories,
                "catalogue": catalogue,
                "filter": filter,
            },
            is_repeatable=True,
        )
        return answer

    async def trending(
        self,
        /,
        *,
        k: int | None = None,
        window: Literal["hour"] | Literal["day"] | Literal["week"] | None = None,
        allow: list[str] | None = None,
        deny: list[str] | None = None,
        categories: list[str] | None = None,
        catalogue: str | None = None,
        filter: str | None = None,
    ) -> PopularResponse:
        """Items with more events than their own past predicts, those furthest above it first. Fewer than k, if fewer
        rise."""
        answer: PopularResponse = await self._call(
            "GET",
            "/trending",
            query={
                "k": k,
                "window": window,
                "allow": allow,
                "deny": deny,
                "categories": categories,
                "catalogue": catalogue,
                "filter": filter,
            },
            is_repeatable=True,
        )
        return answer

    async def list_catalogues(self, /) -> CataloguesResponse:
        """List Catalogues"""
        answer: CataloguesResponse = await self._call("GET", "/catalogues", is_repeatable=True)
        return answer

    async def list_models(self, /) -> ModelsResponse:
        """The models that are loaded: version, what each number of reasoning steps gains and costs, as measured."""
        answer: ModelsResponse = await self._call("GET", "/models", is_repeatable=True)
        return answer

    async def add_model(self, /, **body: Unpack[ModelRequest]) -> Model:
        """Load a bundle beside the others: its hashes are checked, its answers compared with those of its export, its
        cost is measured. It answers nobody before it is activated or given traffic. Takes seconds to minutes."""
        answer: Model = await self._call("POST", "/models", body=body)
        return answer

    async def read_traffic(self, /) -> TrafficResponse:
        """Which model answers whom."""
        answer: TrafficResponse = await self._call("GET", "/traffic", is_repeatable=True)
        return answer

    async def direct_traffic(self, /, **body: Unpack[TrafficBody]) -> TrafficResponse:
        """Split the users over models and numbers of reasoning steps, in place of the split before. A user stays in an
        arm as long as `name` stays. Users whom no arm takes are answered by the active model. `shadow` searches for
        requests as well, and nobody gets its answers; metrics say how far they agree."""
        answer: TrafficResponse = await self._call("PUT", "/traffic", body=body, is_repeatable=True)
        return answer

    async def livez(self, /) -> Any:
        """503 once the engine is dead (ended, hung, or failing at everything): only a restart helps then."""
        answer: Any = await self._call("GET", "/livez", is_repeatable=True)
        return answer

    async def readyz(self, /) -> Any:
        """200 when requests are answered; else 503 with the reason: loading, warming, replaying (changes made before
        the start), draining or engine dead. With several workers, any of them reports for all that accept requests.
        `redis` says why Redis is not used, if it should be."""
        answer: Any = await self._call("GET", "/readyz", is_repeatable=True)
        return answer

    async def server_live(self, /) -> Any:
        """As `/livez`."""
        answer: Any = await self._call("GET", "/v2/health/live", is_repeatable=True)
        return answer

    async def server_ready(self, /) -> Any:
        """As `/readyz`."""
        answer: Any = await self._call("GET", "/v2/health/ready", is_repeatable=True)
        return answer

    async def server_metadata(self, /) -> ServerMetadata:
        """The name and version of this program."""
        answer: ServerMetadata = await self._call("GET", "/v2", is_repeatable=True)
        return answer

    async def model_ready(self, name: str, /) -> ModelReady:
        """Whether a bundle of this name is loaded. What is loaded has been warmed up."""
        answer: ModelReady = await self._call("GET", f"/v2/models/{segment(name)}/ready", is_repeatable=True)
        return answer

    async def model_metadata(self, name: str, /) -> ModelMetadata:
        """The loaded versions of a bundle, and what goes in and comes out; `/models` says more."""
        answer: ModelMetadata = await self._call("GET", f"/v2/models/{segment(name)}", is_repeatable=True)
        return answer

    async def activate_model(self, version: str, /) -> Model:
        """Answer by this model from now on, here at once and in other processes within seconds. Requests that have
        begun keep theirs. The model before stays loaded: activate it to roll back."""
        answer: Model = await self._call("POST", f"/models/{segment(version)}/activate")
        return answer

    async def retire_model(self, version: str, /) -> None:
        """Unload a model that is neither active nor given traffic. Its memory is free once its last request is
        answered."""
        await self._call("DELETE", f"/models/{segment(version)}", is_repeatable=True)

    async def name_catalogue(self, name: str, body: CatalogueItems | CatalogueFilter, /) -> NamedCatalogue:
        """A named subset of the items, which requests may choose: a list, or whatever passes a filter, now and as items
        and times change. One of the same name is replaced."""
        answer: NamedCatalogue = await self._call("PUT", f"/catalogues/{segment(name)}", body=body, is_repeatable=True)
        return answer

    async def list_changed_items(
        self,
        /,
        *,
        change: list[Literal["added"] | Literal["changed"] | Literal["removed"]] | None = None,
        after: int | None = None,
        limit: int | None = None,
    ) -> ChangedItems:
        """The items that changes have added, changed or removed so far, whoever made them, in every process the same.
        An item that changes again while you turn pages moves ahead of them; no page repeats another."""
        answer: ChangedItems = await self._call(
            "GET", "/catalogues/changes", query={"change": change, "after": after, "limit": limit}, is_repeatable=True
        )
        return answer

    async def put_scenario(self, name: str, /, **body: Unpack[Scenario]) -> NamedScenario:
        """Preset what requests leave out that name this scenario. One of the same name is replaced."""
        answer: NamedScenario = await self._call("PUT", f"/scenarios/{segment(name)}", body=body, is_repeatable=True)
        return answer

    async def delete_scenario(self, name: str, /) -> None:
        """From now on requests that name this scenario are refused."""
        await self._call("DELETE", f"/scenarios/{segment(name)}", is_repeatable=True)
