// Written by `make clients` from the OpenAPI document; do not edit.
import { Options, Transport } from "./transport.js";

export { NotFound, Options, ServiceError, Settings, Unavailable } from "./transport.js";

/** A share of the users, and the model that answers them. */
export interface ArmBody {
  version: string;
  percent: number;
  /** for requests that name none; default: the model's default */
  reasoning_steps?: number | null;
}

/** Each request is validated on its own, so that an invalid one does not affect the others. */
export interface BatchRequest {
  requests: Array<RecommendRequest>;
}

export interface BatchResponse {
  /** in the order of the requests */
  results: Array<RecommendResponse | Problem>;
}

/** Adds log(factor) to the model's score of every item that passes the filter. */
export interface Boost {
  filter: string;
  /** above 1 for more of these items, below 1 for fewer */
  factor: number;
}

/** A named subset of whatever passes a filter, now and as items and times change. */
export interface CatalogueFilter {
  filter: string;
}

/** A named subset as a list. */
export interface CatalogueItems {
  /** ids that the catalogue does not have are ignored */
  items: Array<string>;
}

/** The live catalogue of the active model, as this process has it. */
export interface CataloguesResponse {
  /** version of the model */
  version: string;
  /** position of the last change applied; equal in processes that have applied the same changes */
  position: string;
  /** number of items that may be recommended */
  items: number;
  /** seconds since this process last knew that it had applied every change */
  lag_seconds: number;
  /** whether changes outlive a restart */
  durable: boolean;
  catalogues: Array<NamedCatalogue>;
}

/** An item that differs from what the model's bundle has, with its last change. */
export interface ChangedItem {
  item_id: string;
  title: string | null;
  /** added: not in the bundle; changed: in the bundle; removed: in no answer any more */
  change: "added" | "changed" | "removed";
  /** null if the log of changes has no time for it */
  changed_at: string | null;
  available_from: string | null;
  available_until: string | null;
}

export interface ChangedItems {
  /** position of the last change in the list, as in GET /catalogues */
  position: string;
  /** the most recently changed first, each once */
  items: Array<ChangedItem>;
  /** the `after` of the next page; null at the end */
  next: number | null;
}

/** Measured time of a batch of one shape on this machine. */
export interface Cost {
  reasoning_steps: number;
  /** the beam widths of the batch's searches, added up */
  beam_rows: number;
  median_ms: number;
  p95_ms: number;
  /** number of recent runs this is measured from */
  runs: number;
}

export interface EventsRequest {
  /** item ids and events, oldest first, as given */
  items: Array<string | HistoryEvent>;
}

export interface EventsResponse {
  user_id: string;
  stored: number;
  history_length: number;
  /** stored, but not in the current catalogue */
  unknown_items: Array<string>;
}

/** The items nearest to the model's state after each step, and the parts of each item's score. */
export interface Explanation {
  steps: Array<ReasoningStep>;
  items: Array<ItemExplanation>;
  dense_weight: number;
  neighbours_weight: number;
  /** the network's probability g in score = log(g * exp(log-probabilities + dense_weight * dense_score) ** alpha + (1 - g) * exp(neighbour_score) ** beta) / alpha; absent if the model adds neighbours_weight * neighbour_score instead */
  gate?: number | null;
  /** alpha; absent if it is 1 */
  network_power?: number;
  /** beta; absent if it is 1 */
  memory_power?: number;
}

/** What somebody did with an item of a recommendation. */
export interface FeedbackRequest {
  recommendation_id: string;
  item_id: string;
  event: "impression" | "click" | "like" | "dislike" | "cart" | "purchase" | "play" | "share";
  /** such as a price or seconds played; kept as it is */
  value?: number | null;
  /** seconds since the epoch; default: when the request arrived */
  time?: number | null;
}

export interface FeedbackResponse {
  /** false: this event on this item of this recommendation was counted before */
  counted: boolean;
  /** position of the item in the list, 1 for the best; the next page counts on */
  position: number;
  /** whether it is kept for training; false: it is only counted */
  kept: boolean;
}

export interface FeedbackSummaries {
  summaries: Array<FeedbackSummary>;
}

/** Feedback on one model, source and number of steps, since this service started. */
export interface FeedbackSummary {
  version: string;
  source: string;
  reasoning_steps: number;
  recommendations: number;
  events: Record<string, number>;
  /** share of recommendations with any event but impressions; null without any */
  hit_rate: Rate | null;
  /** clicks per impression; null without impressions */
  click_through_rate: Rate | null;
}

/** What somebody did with an item; an item id alone stands for an event about which nothing else is known. */
export interface HistoryEvent {
  item_id: string;
  /** such as view or purchase; a model may weight types, and leave some out */
  type?: string | null;
  /** such as a price or a rating; kept with the event */
  value?: number | null;
  /** seconds since 1970 */
  timestamp?: number | null;
}

export interface Item {
  item_id: string;
  title: string | null;
  categories: Array<string>;
  brand?: string | null;
  fields?: Record<string, string | number | boolean | Array<string>>;
  available_from?: string | null;
  available_until?: string | null;
  popularity: number;
  /** the semantic ID as vocabulary ids */
  tokens: Array<number>;
}

export interface ItemExplanation {
  item_id: string;
  /** one per token of the semantic ID */
  token_log_probabilities: Array<number>;
  dense_score: number;
  /** log of the item's share in the item graph, or its log score; null if it has none */
  neighbour_score?: number | null;
  /** log of the factors, added to the score */
  boost?: number | null;
  /** cosine similarity of the state and the item, one per step */
  similarity: Array<number>;
}

/** All that is known about an item. A new item gets its semantic ID from its text: title, brand, categories and description. */
export interface ItemFields {
  title?: string | null;
  brand?: string | null;
  categories?: Array<string>;
  description?: string | null;
  /** other attributes, for filters: numbers, strings, booleans, lists; ISO 8601 strings are times */
  fields?: Record<string, string | number | boolean | Array<string>>;
  /** not recommended before this time */
  available_from?: string | null;
  /** not recommended from this time on */
  available_until?: string | null;
}

export interface ItemsPut {
  /** one for each item of the request, in the same order */
  results: Array<Item | Problem>;
}

export interface ItemsRequest {
  items: Array<PutItem>;
}

export interface ItemsResponse {
  items: Array<Item>;
}

export interface Model {
  version: string;
  name: string;
  active: boolean;
  /** that may be recommended now */
  items: number;
  max_steps: number;
  default_steps: number;
  max_history_items: number;
  max_beam_width: number;
  dense_weight: number;
  neighbours_weight: number;
  /** of all items that have not been removed */
  categories: Array<string>;
  catalogues: Array<string>;
  /** measured at export, per number of reasoning steps */
  accuracy: Array<Record<string, unknown>>;
  /** measured on this machine, since the start */
  cost: Array<Cost>;
  /** accuracy and time of every number of reasoning steps, 0 first */
  by_steps: Array<StepsFigures>;
}

export interface ModelMetadata {
  name: string;
  versions: Array<string>;
  platform: string;
  inputs: Array<Tensor>;
  outputs: Array<Tensor>;
}

export interface ModelReady {
  name: string;
  ready: boolean;
}

export interface ModelRequest {
  /** folder of the bundle, relative to STREAMREC_MODELS_DIR */
  path: string;
}

export interface ModelsResponse {
  models: Array<Model>;
}

export interface NamedCatalogue {
  name: string;
  /** number of its items that may be recommended */
  items: number;
  /** absent if it is a list */
  filter?: string | null;
}

export interface NamedItem {
  item_id: string;
  title?: string | null;
}

export interface NamedScenario {
  /** reasoning paths searched in parallel; default: the bundle's */
  reasoning_paths?: number | null;
  /** weight of the dense score; default: the bundle's */
  dense_weight?: number | null;
  /** weight of the item graph, 0: the network alone; default: the bundle's */
  neighbours_weight?: number | null;
  /** only items that pass, such as price < 50 and brand in ["A", "B"]; docs/FILTERS.md has all */
  filter?: string | null;
  /** what to recommend more or less of */
  boost?: Array<Boost> | null;
  /** time budget */
  timeout_ms?: number | null;
  /** how many items to return */
  k?: number;
  /** at least k; default: the larger of k and the service's default */
  beam_width?: number | null;
  /** never recommend items of the history */
  exclude_seen?: boolean;
  /** recommend only these */
  allow?: Array<string> | null;
  /** never recommend these */
  deny?: Array<string>;
  /** recommend only items in at least one of these; empty: no restriction */
  categories?: Array<string>;
  /** recommend only items of this named subset */
  catalogue?: string | null;
  /** how much the list avoids similar items; it is chosen from all that the beams find */
  diversity?: number;
  /** most items per category; the list is shorter if the beams find no others */
  max_per_category?: number | null;
  /** how far to move down items that the user was shown recently but did not take (from POST /feedback): 0.5 as if half as probable, 1 behind all others */
  rotation?: number;
  /** slots reserved for new items, which nobody had when the model was trained, the model's best first; if there are fewer, other items fill the list */
  explore?: number;
  /** default: the model's default */
  reasoning_steps?: number | "auto" | null;
  name: string;
}

export interface PopularResponse {
  model_version: string;
  window: "hour" | "day" | "week" | "month";
  /** best first; score: events in the window or, of trending items, by how many standard deviations they exceed what their past predicts; 0: by the bundle's popularity */
  items: Array<RecommendedItem>;
  /** events in the window, on all items; older events count less */
  events: number;
  /** whether all processes count together; false: the one that answered counts its own */
  shared: boolean;
  /** ids in allow or deny that are not in the catalogue */
  unknown_items: Array<string>;
}

/** RFC 9457 problem details. */
export interface Problem {
  type: string;
  title: string;
  status: number;
  detail: string;
  field?: string | null;
  /** position of the character at which a filter is wrong, the first being 1 */
  position?: number | null;
  /** all invalid fields, if there are several */
  errors?: Array<Record<string, string>> | null;
  /** seconds */
  retry_after?: number | null;
}

export interface PutItem {
  title?: string | null;
  brand?: string | null;
  categories?: Array<string>;
  description?: string | null;
  /** other attributes, for filters: numbers, strings, booleans, lists; ISO 8601 strings are times */
  fields?: Record<string, string | number | boolean | Array<string>>;
  /** not recommended before this time */
  available_from?: string | null;
  /** not recommended from this time on */
  available_until?: string | null;
  item_id: string;
}

/** The user, their history, and the items to put in order for them. */
export interface RankRequest {
  /** reasoning paths searched in parallel; default: the bundle's */
  reasoning_paths?: number | null;
  /** weight of the dense score; default: the bundle's */
  dense_weight?: number | null;
  /** weight of the item graph, 0: the network alone; default: the bundle's */
  neighbours_weight?: number | null;
  /** only items that pass, such as price < 50 and brand in ["A", "B"]; docs/FILTERS.md has all */
  filter?: string | null;
  /** what to recommend more or less of */
  boost?: Array<Boost> | null;
  /** time budget */
  timeout_ms?: number | null;
  /** without it nothing is cached and no known history is used */
  user_id?: string | null;
  /** item ids and events, oldest first, as given; omitted or empty: the known history */
  history?: Array<string | HistoryEvent> | null;
  explain?: boolean;
  /** item ids; each is scored, including seen ones, and returned once */
  items: Array<string>;
}

/** A share with its 95% confidence interval (Wilson). */
export interface Rate {
  share: number;
  low: number;
  high: number;
}

/** The model's state before any reasoning (step 0) or after a reasoning step. */
export interface ReasoningStep {
  step: number;
  /** vocabulary id; null at step 0, or if steps have no tokens */
  token?: number | null;
  log_probability?: number | null;
  nearest_items: Array<NamedItem>;
}

/** The user, their history, and what may be recommended to them. */
export interface RecommendRequest {
  /** reasoning paths searched in parallel; default: the bundle's */
  reasoning_paths?: number | null;
  /** weight of the dense score; default: the bundle's */
  dense_weight?: number | null;
  /** weight of the item graph, 0: the network alone; default: the bundle's */
  neighbours_weight?: number | null;
  /** only items that pass, such as price < 50 and brand in ["A", "B"]; docs/FILTERS.md has all */
  filter?: string | null;
  /** what to recommend more or less of */
  boost?: Array<Boost> | null;
  /** time budget */
  timeout_ms?: number | null;
  /** without it nothing is cached and no known history is used */
  user_id?: string | null;
  /** item ids and events, oldest first, as given; omitted or empty: the known history */
  history?: Array<string | HistoryEvent> | null;
  explain?: boolean;
  /** how many items to return */
  k?: number;
  /** at least k; default: the larger of k and the service's default */
  beam_width?: number | null;
  /** never recommend items of the history */
  exclude_seen?: boolean;
  /** recommend only these */
  allow?: Array<string> | null;
  /** never recommend these */
  deny?: Array<string>;
  /** recommend only items in at least one of these; empty: no restriction */
  categories?: Array<string>;
  /** recommend only items of this named subset */
  catalogue?: string | null;
  /** how much the list avoids similar items; it is chosen from all that the beams find */
  diversity?: number;
  /** most items per category; the list is shorter if the beams find no others */
  max_per_category?: number | null;
  /** how far to move down items that the user was shown recently but did not take (from POST /feedback): 0.5 as if half as probable, 1 behind all others */
  rotation?: number;
  /** slots reserved for new items, which nobody had when the model was trained, the model's best first; if there are fewer, other items fill the list */
  explore?: number;
  /** name of a preset for all that this request leaves out */
  scenario?: string | null;
  /** recommendation_id of the previous page, which this answer continues. Send everything else as for that page; all pages together have at most as many items as the widest permitted beam */
  after?: string | null;
}

/** The answer to one request. */
export interface RecommendResponse {
  recommendation_id: string;
  user_id: string | null;
  model_version: string;
  source: "model" | "popularity";
  reasoning_steps: number;
  reasoning_paths: number;
  /** 0 if given items were ranked, since nothing was searched for */
  beam_width: number;
  cache: "memory" | "redis" | "miss" | "off";
  /** best first, distinct */
  items: Array<RecommendedItem>;
  /** ids in history, allow or deny that are not in the catalogue; removed items in allow or deny (a history still uses them); items that could not be ranked */
  unknown_items: Array<string>;
  timings_ms: Timings;
  explanation?: Explanation | null;
}

/** One item of an answer. */
export interface RecommendedItem {
  item_id: string;
  score: number;
  title?: string | null;
  categories?: Array<string>;
}

/** A preset for requests that name it. What a request sets itself takes precedence. */
export interface Scenario {
  /** reasoning paths searched in parallel; default: the bundle's */
  reasoning_paths?: number | null;
  /** weight of the dense score; default: the bundle's */
  dense_weight?: number | null;
  /** weight of the item graph, 0: the network alone; default: the bundle's */
  neighbours_weight?: number | null;
  /** only items that pass, such as price < 50 and brand in ["A", "B"]; docs/FILTERS.md has all */
  filter?: string | null;
  /** what to recommend more or less of */
  boost?: Array<Boost> | null;
  /** time budget */
  timeout_ms?: number | null;
  /** how many items to return */
  k?: number;
  /** at least k; default: the larger of k and the service's default */
  beam_width?: number | null;
  /** never recommend items of the history */
  exclude_seen?: boolean;
  /** recommend only these */
  allow?: Array<string> | null;
  /** never recommend these */
  deny?: Array<string>;
  /** recommend only items in at least one of these; empty: no restriction */
  categories?: Array<string>;
  /** recommend only items of this named subset */
  catalogue?: string | null;
  /** how much the list avoids similar items; it is chosen from all that the beams find */
  diversity?: number;
  /** most items per category; the list is shorter if the beams find no others */
  max_per_category?: number | null;
  /** how far to move down items that the user was shown recently but did not take (from POST /feedback): 0.5 as if half as probable, 1 behind all others */
  rotation?: number;
  /** slots reserved for new items, which nobody had when the model was trained, the model's best first; if there are fewer, other items fill the list */
  explore?: number;
  /** default: the model's default */
  reasoning_steps?: number | "auto" | null;
}

export interface ScenariosResponse {
  scenarios: Array<NamedScenario>;
}

export interface ServerMetadata {
  name: string;
  version: string;
  extensions: Array<string>;
}

/** A model that also searches for requests, but whose answers nobody gets. */
export interface ShadowBody {
  version: string;
  /** share of the requests, drawn at random */
  percent?: number;
}

export interface SimilarItem {
  item_id: string;
  title: string | null;
  categories: Array<string>;
  by: "together" | "content";
  /** together: this item's share of what follows or resembles the other; content: cosine similarity */
  score: number;
}

export interface SimilarResponse {
  item_id: string;
  model_version: string;
  /** best first; if there are both kinds, those taken together come first */
  items: Array<SimilarItem>;
  /** ids in allow or deny that are not in the catalogue */
  unknown_items: Array<string>;
}

/** The accuracy of a number of reasoning steps, measured at export, and its time on this machine. null: not measured. */
export interface StepsFigures {
  reasoning_steps: number;
  /** whether `reasoning_steps=auto` may take this many */
  auto: boolean;
  /** validation users that accuracy was measured on */
  users: number | null;
  /** all validation users, of whom these were drawn */
  of: number | null;
  recall_at_10: number | null;
  ndcg_at_10: number | null;
  /** in NDCG@10 over 0 steps, on the same users */
  gain: number | null;
  /** lower end of the gain's 95% interval over users */
  gain_low: number | null;
  /** upper end of it */
  gain_high: number | null;
  /** smallest true gain that this many users show with 80% power */
  detectable: number | null;
  /** of recent searches that were alone in their batch, with the default beam width */
  median_ms: number | null;
}

export interface Tensor {
  name: string;
  datatype: string;
  /** -1: of any length */
  shape: Array<number>;
}

/** Milliseconds. `encode`, `reason` and `decode` are those of the batch that the request was in. `reason` is not 0 with 0 steps: the first pass of the decoder, which every answer needs, counts as reasoning. */
export interface Timings {
  queue?: number;
  cache?: number;
  encode?: number;
  reason?: number;
  decode?: number;
  total?: number;
}

export interface TrafficBody {
  /** name of the experiment; another name assigns the users anew */
  name?: string;
  /** at most 100% in total; the other users get the active model */
  arms?: Array<ArmBody>;
  shadow?: ShadowBody | null;
}

export interface TrafficResponse {
  /** name of the experiment; another name assigns the users anew */
  name?: string;
  /** at most 100% in total; the other users get the active model */
  arms?: Array<ArmBody>;
  shadow?: ShadowBody | null;
  active: string;
}

export interface UserResponse {
  user_id: string;
  /** the known history, oldest first, as it was sent */
  items: Array<string | HistoryEvent>;
  /** the cache tiers that hold an encoded history */
  cached: Array<string>;
  /** items shown recently but not taken, oldest first; kept for `rotation` */
  shown: Array<string>;
  /** how many records of feedback on the user's recommendations are kept for training */
  feedback: number;
}

export class Client extends Transport {
  /** The best items for one user, after a number of reasoning steps. */
  recommend(body: RecommendRequest, query?: { reasoning_steps?: number | "auto" }, options?: Options): Promise<RecommendResponse>;
  /** Given items in the order in which one user wants them, the best first, with the scores that `/recommend` gives them. For retrieval by something else: nothing is searched for, and no item is left out, however unlikely it is. A user of whom nothing is known gets them by popularity. */
  rank(body: RankRequest, query?: { reasoning_steps?: number | "auto" }, options?: Options): Promise<RecommendResponse>;
  /** Many requests in one call; each gets its own answer or its own problem details. */
  recommendBatch(body: BatchRequest, query?: { reasoning_steps?: number | "auto" }, options?: Options): Promise<BatchResponse>;
  /** List Scenarios */
  listScenarios(options?: Options): Promise<ScenariosResponse>;
  /** Append items to the user's history. Acknowledged only once stored; after a 503, check whether they were. */
  appendEvents(user_id: string, body: EventsRequest, options?: Options): Promise<EventsResponse>;
  /** Everything that is kept about a user. This looks through the feedback of all users: ask when somebody wants to know what is kept of them, not for every page. */
  readUser(user_id: string, options?: Options): Promise<UserResponse>;
  /** Erase everything kept about a user, known history, encoded histories, feedback and impressions: in Redis and files at once, in other processes within moments. After a 503 something may be left: send the request again. */
  eraseUser(user_id: string, options?: Options): Promise<void>;
  /** Report what somebody did with a recommended item. Acknowledged only once stored, and counted once however often it is sent: after a 503, send it again. */
  giveFeedback(body: FeedbackRequest, options?: Options): Promise<FeedbackResponse>;
  /** Hit rate and click-through rate by model, source and reasoning steps, with intervals: of all workers of this replica, since its start. Prometheus has the counters, of all replicas and any time. */
  summariseFeedback(options?: Options): Promise<FeedbackSummaries>;
  /** Items whose title contains every word of the query, most popular first; without a query, all items. */
  findItems(query?: { query?: string; limit?: number }, options?: Options): Promise<ItemsResponse>;
  /** Add or change many items, with one result for each, in their order. */
  putItems(body: ItemsRequest, options?: Options): Promise<ItemsPut>;
  /** Items for the page of another one: what users took together with it, and what is like it by its content, which needs no user to have seen either. */
  similarItems(item_id: string, query?: { k?: number; by?: "together" | "content" | null; allow?: Array<string> | null; deny?: Array<string> | null; categories?: Array<string> | null; catalogue?: string | null; filter?: string | null }, options?: Options): Promise<SimilarResponse>;
  /** Read Item */
  readItem(item_id: string, options?: Options): Promise<Item>;
  /** Add an item, or change one: what is left out is emptied. A new item gets a semantic ID from its text, which it keeps. Acknowledged once stored, and it can be recommended from then on; after a 503, look whether it is there. */
  putItem(item_id: string, body: ItemFields, options?: Options): Promise<Item>;
  /** Take an item out of every answer. Histories may go on to name it, and it can be put again. */
  deleteItem(item_id: string, options?: Options): Promise<void>;
  /** Items with the most events lately, on histories and in feedback; an event counts less the older it is. Behind them, as far as k is not reached, what is popular in the bundle. */
  popular(query?: { k?: number; window?: "hour" | "day" | "week" | "month"; allow?: Array<string> | null; deny?: Array<string> | null; categories?: Array<string> | null; catalogue?: string | null; filter?: string | null }, options?: Options): Promise<PopularResponse>;
  /** Items with more events than their own past predicts, those furthest above it first. Fewer than k, if fewer rise. */
  trending(query?: { k?: number; window?: "hour" | "day" | "week"; allow?: Array<string> | null; deny?: Array<string> | null; categories?: Array<string> | null; catalogue?: string | null; filter?: string | null }, options?: Options): Promise<PopularResponse>;
  /** List Catalogues */
  listCatalogues(options?: Options): Promise<CataloguesResponse>;
  /** The models that are loaded: version, what each number of reasoning steps gains and costs, as measured. */
  listModels(options?: Options): Promise<ModelsResponse>;
  /** Load a bundle beside the others: its hashes are checked, its answers compared with those of its export, its cost is measured. It answers nobody before it is activated or given traffic. Takes seconds to minutes. */
  addModel(body: ModelRequest, options?: Options): Promise<Model>;
  /** Which model answers whom. */
  readTraffic(options?: Options): Promise<TrafficResponse>;
  /** Split the users over models and numbers of reasoning steps, in place of the split before. A user stays in an arm as long as `name` stays. Users whom no arm takes are answered by the active model. `shadow` searches for requests as well, and nobody gets its answers; metrics say how far they agree. */
  directTraffic(body: TrafficBody, options?: Options): Promise<TrafficResponse>;
  /** 503 once the engine is dead (ended, hung, or failing at everything): only a restart helps then. */
  livez(options?: Options): Promise<unknown>;
  /** 200 when requests are answered; else 503 with the reason: loading, warming, replaying (changes made before the start), draining or engine dead. With several workers, any of them reports for all that accept requests. `redis` says why Redis is not used, if it should be. */
  readyz(options?: Options): Promise<unknown>;
  /** As `/livez`. */
  serverLive(options?: Options): Promise<unknown>;
  /** As `/readyz`. */
  serverReady(options?: Options): Promise<unknown>;
  /** The name and version of this program. */
  serverMetadata(options?: Options): Promise<ServerMetadata>;
  /** Whether a bundle of this name is loaded. What is loaded has been warmed up. */
  modelReady(name: string, options?: Options): Promise<ModelReady>;
  /** The loaded versions of a bundle, and what goes in and comes out; `/models` says more. */
  modelMetadata(name: string, options?: Options): Promise<ModelMetadata>;
  /** Answer by this model from now on, here at once and in other processes within seconds. Requests that have begun keep theirs. The model before stays loaded: activate it to roll back. */
  activateModel(version: string, options?: Options): Promise<Model>;
  /** Unload a model that is neither active nor given traffic. Its memory is free once its last request is answered. */
  retireModel(version: string, options?: Options): Promise<void>;
  /** A named subset of the items, which requests may choose: a list, or whatever passes a filter, now and as items and times change. One of the same name is replaced. */
  nameCatalogue(name: string, body: CatalogueItems | CatalogueFilter, options?: Options): Promise<NamedCatalogue>;
  /** The items that changes have added, changed or removed so far, whoever made them, in every process the same. An item that changes again while you turn pages moves ahead of them; no page repeats another. */
  listChangedItems(query?: { change?: Array<"added" | "changed" | "removed"> | null; after?: number | null; limit?: number }, options?: Options): Promise<ChangedItems>;
  /** Preset what requests leave out that name this scenario. One of the same name is replaced. */
  putScenario(name: string, body: Scenario, options?: Options): Promise<NamedScenario>;
  /** From now on requests that name this scenario are refused. */
  deleteScenario(name: string, options?: Options): Promise<void>;
}
