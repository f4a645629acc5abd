// Written by `make clients` from the OpenAPI document; do not edit.
import { Transport, segment } from "./transport.js";

export { NotFound, ServiceError, Unavailable } from "./transport.js";

export class Client extends Transport {
  recommend(body, query, options) {
    return this.call("POST", "/recommend", { body, query, isRepeatable: true, ...options });
  }

  rank(body, query, options) {
    return this.call("POST", "/rank", { body, query, isRepeatable: true, ...options });
  }

  recommendBatch(body, query, options) {
    return this.call("POST", "/recommend/batch", { body, query, isRepeatable: true, ...options });
  }

  listScenarios(options) {
    return this.call("GET", "/scenarios", { isRepeatable: true, ...options });
  }

  appendEvents(user_id, body, options) {
    return this.call("POST", `/users/${segment(user_id)}/events`, { body, isRepeatable: false, ...options });
  }

  readUser(user_id, options) {
    return this.call("GET", `/users/${segment(user_id)}`, { isRepeatable: true, ...options });
  }

  eraseUser(user_id, options) {
    return this.call("DELETE", `/users/${segment(user_id)}`, { isRepeatable: true, ...options });
  }

  giveFeedback(body, options) {
    return this.call("POST", "/feedback", { body, isRepeatable: true, ...options });
  }

  summariseFeedback(options) {
    return this.call("GET", "/feedback/summary", { isRepeatable: true, ...options });
  }

  findItems(query, options) {
    return this.call("GET", "/items", { query, isRepeatable: true, ...options });
  }

  putItems(body, options) {
    return this.call("POST", "/items", { body, isRepeatable: false, ...options });
  }

  similarItems(item_id, query, options) {
    return this.call("GET", `/items/${segment(item_id)}/similar`, { query, isRepeatable: true, ...options });
  }

  readItem(item_id, options) {
    return this.call("GET", `/items/${segment(item_id)}`, { isRepeatable: true, ...options });
  }

  putItem(item_id, body, options) {
    return this.call("PUT", `/items/${segment(item_id)}`, { body, isRepeatable: true, ...options });
  }

  deleteItem(item_id, options) {
    return this.call("DELETE", `/items/${segment(item_id)}`, { isRepeatable: true, ...options });
  }

  popular(query, options) {
    return this.call("GET", "/popular", { query, isRepeatable: true, ...options });
  }

  trending(query, options) {
    return this.call("GET", "/trending", { query, isRepeatable: true, ...options });
  }

  listCatalogues(options) {
    return this.call("GET", "/catalogues", { isRepeatable: true, ...options });
  }

  listModels(options) {
    return this.call("GET", "/models", { isRepeatable: true, ...options });
  }

  addModel(body, options) {
    return this.call("POST", "/models", { body, isRepeatable: false, ...options });
  }

  readTraffic(options) {
    return this.call("GET", "/traffic", { isRepeatable: true, ...options });
  }

  directTraffic(body, options) {
    return this.call("PUT", "/traffic", { body, isRepeatable: true, ...options });
  }

  livez(options) {
    return this.call("GET", "/livez", { isRepeatable: true, ...options });
  }

  readyz(options) {
    return this.call("GET", "/readyz", { isRepeatable: true, ...options });
  }

  serverLive(options) {
    return this.call("GET", "/v2/health/live", { isRepeatable: true, ...options });
  }

  serverReady(options) {
    return this.call("GET", "/v2/health/ready", { isRepeatable: true, ...options });
  }

  serverMetadata(options) {
    return this.call("GET", "/v2", { isRepeatable: true, ...options });
  }

  modelReady(name, options) {
    return this.call("GET", `/v2/models/${segment(name)}/ready`, { isRepeatable: true, ...options });
  }

  modelMetadata(name, options) {
    return this.call("GET", `/v2/models/${segment(name)}`, { isRepeatable: true, ...options });
  }

  activateModel(version, options) {
    return this.call("POST", `/models/${segment(version)}/activate`, { isRepeatable: false, ...options });
  }

  retireModel(version, options) {
    return this.call("DELETE", `/models/${segment(version)}`, { isRepeatable: true, ...options });
  }

  nameCatalogue(name, body, options) {
    return this.call("PUT", `/catalogues/${segment(name)}`, { body, isRepeatable: true, ...options });
  }

  listChangedItems(query, options) {
    return this.call("GET", "/catalogues/changes", { query, isRepeatable: true, ...options });
  }

  putScenario(name, body, options) {
    return this.call("PUT", `/scenarios/${segment(name)}`, { body, isRepeatable: true, ...options });
  }

  deleteScenario(name, options) {
    return this.call("DELETE", `/scenarios/${segment(name)}`, { isRepeatable: true, ...options });
  }
}
