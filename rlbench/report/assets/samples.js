/* The sample explorer: filters on the index, unpacks a step's texts only when they are looked at. All text is set as
   text, never as markup. */
const PAGE_SIZES = { groups: 6, single: 24 };
const FIRST_CHARACTER = 35, LEVELS_PER_ROOT = 20;
const SURPRISE = [0.1, 0.5, 1, 2, 4];
const unpacked = new Map();

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function chunk(number) {
  if (!unpacked.has(number)) unpacked.set(number, unpack(document.getElementById(`chunk-${number}`).textContent));
  return unpacked.get(number);
}

function visible(text) {
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g,
    (character) => "\\u" + character.charCodeAt(0).toString(16).padStart(4, "0"));
}

function element(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  for (const child of children) if (child !== null) made.append(typeof child === "string" ? visible(child) : child);
  return made;
}

function filterIndexes(samples, filters) {
  const found = [];
  for (let i = 0; i < samples.step.length; i++) {
    if (filters.step !== "" && filters.step !== `${samples.isEval[i] ? "eval-" : ""}${samples.step[i]}`) continue;
    if (filters.outcome && (filters.outcome === "cut") !== Boolean(samples.isCut[i])) continue;
    const reward = samples.reward[i];
    if (filters.min !== null && (reward === null || reward < filters.min)) continue;
    if (filters.max !== null && (reward === null || reward > filters.max)) continue;
    found.push(i);
  }
  return found;
}

function sortIndexes(samples, indexes, order) {
  const keys = { high: [samples.reward, -1], low: [samples.reward, 1], long: [samples.tokens, -1], short: [samples.tokens, 1] };
  if (!(order in keys)) return indexes;
  const [values, sign] = keys[order];
  const known = (i) => values[i] !== null;
  return indexes.filter(known).sort((a, b) => sign * (values[a] - values[b]) || a - b)
    .concat(indexes.filter((i) => !known(i)));
}

function groupIndexes(samples, indexes) {
  const groups = new Map();
  for (const i of indexes) {
    const key = `${samples.chunk[i]} ${samples.prompt[i]}`;
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(i);
  }
  return [...groups.values()];
}

async function withText(samples, indexes, text, isStale) {
  const wanted = text.toLowerCase(), found = [];
  let last = -1;
  for (const i of indexes) {
    const texts = (await chunk(samples.chunk[i])).texts;
    if (samples.chunk[i] !== last && isStale()) return null;
    last = samples.chunk[i];
    if (texts[samples.row[i]].toLowerCase().includes(wanted)) found.push(i);
  }
  return found;
}

function logprobAt(codes, token) {
  const level = codes.charCodeAt(token) - FIRST_CHARACTER;
  return -((level / LEVELS_PER_ROOT) ** 2);
}

function surpriseClass(logprob) {
  const level = SURPRISE.filter((limit) => -logprob >= limit).length;
  return level ? `l${level}` : "";
}

function advantageClass(advantage) {
  if (!advantage) return "";
  const level = Math.abs(advantage) < 0.5 ? 1 : Math.abs(advantage) < 1.5 ? 2 : 3;
  return (advantage > 0 ? "p" : "n") + level;
}

function tokenSpans(text, lengths, codes) {
  const spans = document.createDocumentFragment();
  let start = 0;
  for (let token = 0; token < lengths.length; token++) {
    const size = lengths.charCodeAt(token) - FIRST_CHARACTER;
    const logprob = logprobAt(codes, token);
    const piece = text.slice(start, start + size);
    start += size;
    if (!size) continue;
    const span = element("span", surpriseClass(logprob), piece);
    span.title = `logprob about ${logprob.toFixed(2)}, probability ${(100 * Math.exp(logprob)).toPrecision(2)}%`;
    spans.append(span);
  }
  return spans;
}

function facts(samples, i, isAlone) {
  const line = element("div", "facts");
  const reward = samples.reward[i], advantage = samples.advantage[i];
  if (isAlone) line.append(`${samples.isEval[i] ? "evaluation after step" : "step"} ${samples.step[i]}, `);
  line.append(`#${samples.sample[i]}, reward `, element("b", "", reward === null ? "none" : String(reward)));
  if (advantage !== null) {
    line.append(", advantage ", element("b", advantage > 0 ? "up" : advantage < 0 ? "down" : "",
      (advantage > 0 ? "+" : "") + advantage.toFixed(2)));
  }
  line.append(`, ${samples.tokens[i]} tokens, `);
  line.append(samples.isCut[i] ? element("span", "cut", "cut at the limit") : "ended");
  const parts = Object.entries(samples.components).filter(([, values]) => values[i] !== null);
  if (parts.length) line.append(element("div", "", parts.map(([name, values]) => `${name} ${values[i]}`).join(", ")));
  return line;
}

function rolloutCard(samples, content, i, colour, isAlone) {
  const row = samples.row[i], text = content.texts[row];
  const canSplit = colour === "logprob" && content.lengths[row] !== null;
  const body = element("pre", colour === "advantage" ? advantageClass(samples.advantage[i]) : "");
  body.append(canSplit ? tokenSpans(text, content.lengths[row], content.logprobs[row]) : visible(text));
  const card = element("article", "rollout", facts(samples, i, isAlone));
  for (const message of content.messages[row] || []) card.append(element("div", "facts error", message));
  card.append(body);
  return card;
}

function promptParts(samples, content, i) {
  const id = samples.prompts[samples.prompt[i]];
  const whole = content.prompts[id] || "", answer = content.answers[id];
  const details = element("details", "", element("summary", "", "Whole prompt"), element("pre", "prompt", whole));
  const end = whole.length > 320 ? "\u2026" + whole.slice(-320) : whole;
  const parts = [element("pre", "prompt-end", end.trim())];
  if (answer !== undefined) parts.push(element("div", "facts", "expected answer: ", element("b", "", answer)));
  if (whole.length > 320) parts.push(details);
  return parts;
}

function groupCard(samples, content, indexes, colour) {
  const i = indexes[0];
  const place = samples.isEval[i] ? `Evaluation after step ${samples.step[i]}` : `Step ${samples.step[i]}`;
  const heading = element("h3", "", `${place}, ${samples.prompts[samples.prompt[i]]}`);
  const cards = element("div", "rollouts", ...indexes.map((k) => rolloutCard(samples, content, k, colour, false)));
  return element("article", "group", element("header", "", heading, ...promptParts(samples, content, i)), cards);
}

function singleCard(samples, content, i, colour) {
  const card = rolloutCard(samples, content, i, colour, true);
  card.append(element("details", "", element("summary", "", "Prompt"), ...promptParts(samples, content, i)));
  return card;
}

function scale(colour) {
  const made = element("span", "scale");
  if (colour === "logprob") {
    made.append("  Tokens by how unlikely they were, in nats: ");
    SURPRISE.forEach((limit, i) => made.append(element("span", `l${i + 1}`, `${limit}+`)));
  } else if (colour === "advantage") {
    made.append("  Advantage: ", element("span", "n3", "negative"), element("span", "p3", "positive"));
  }
  return made;
}

function readFilters(form) {
  const value = (name) => form.elements[name].value;
  const limit = (name) => value(name).trim() === "" || Number.isNaN(Number(value(name))) ? null : Number(value(name));
  return { view: value("view"), step: value("step"), outcome: value("outcome"), min: limit("min"), max: limit("max"),
    text: value("text"), sort: value("sort"), colour: value("colour") };
}

function setUpSamples() {
  const form = document.getElementById("filters");
  if (!form) return;
  const samples = pageData.samples;
  const status = document.getElementById("sample-status"), list = document.getElementById("sample-list");
  const more = document.getElementById("sample-more");
  let items = [], numShown = 0, filters = readFilters(form), turn = 0;

  const steps = new Map(samples.step.map((step, i) => [`${samples.isEval[i] ? "eval-" : ""}${step}`,
    samples.isEval[i] ? `evaluation after ${step}` : String(step)]));
  for (const [key, text] of steps) {
    const option = element("option", "", text);
    option.value = key;
    form.elements.step.append(option);
  }

  async function showMore() {
    const mine = turn, isGroups = filters.view === "groups";
    const next = items.slice(numShown, numShown + PAGE_SIZES[filters.view]);
    numShown += next.length;
    more.hidden = numShown >= items.length;
    const cards = [];
    for (const item of next) {
      const content = await chunk(samples.chunk[isGroups ? item[0] : item]);
      cards.push(isGroups ? groupCard(samples, content, item, filters.colour)
        : singleCard(samples, content, item, filters.colour));
    }
    if (mine === turn) list.append(...cards);
  }

  async function refresh() {
    const mine = ++turn;
    filters = readFilters(form);
    let found = filterIndexes(samples, filters);
    if (filters.text) {
      status.textContent = "Searching \u2026";
      found = await withText(samples, found, filters.text, () => mine !== turn);
      if (found === null || mine !== turn) return;
    }
    found = sortIndexes(samples, found, filters.sort);
    const groups = groupIndexes(samples, found);
    items = filters.view === "groups" ? groups : found;
    status.textContent = `${found.length} completions of ${groups.length} groups match.`;
    status.append(scale(filters.colour));
    list.className = filters.view === "groups" ? "" : "rollouts";
    list.replaceChildren();
    numShown = 0;
    await showMore();
  }

  function tryRefresh() {
    refresh().catch((error) => { status.textContent = `The samples cannot be shown: ${error.message}`; });
  }

  let timer = 0;
  form.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(tryRefresh, 150); });
  form.addEventListener("submit", (event) => { event.preventDefault(); tryRefresh(); });
  more.addEventListener("click", showMore);
  tryRefresh();
}

setUpSamples();
