// What comes from the service or from files is only ever set as text, or as an image's data: URL of a JPEG.

const PAGE = 24;
const MOST_BYTES = 20 * 2 ** 20; // the service's default for an image; a service with less says so itself
const $ = (id) => document.getElementById(id);
let key = "";
try {
  key = sessionStorage.getItem("clipfleet-key") || "";
} catch {
  // storage is blocked: the key lasts until the page is left
}

async function ask(path, body) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = body ? { method: "POST", headers: { ...headers, "Content-Type": "application/json" }, body: JSON.stringify(body) } : { headers };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The service cannot be reached.");
  }
  if (answer.status === 401) {
    $("key").hidden = false;
    throw new Error(key ? "The service does not know this API key." : "The service asks for an API key.");
  }
  const content = await answer.json().catch(() => null);
  if (!answer.ok) {
    const said = content?.error?.message || `status ${answer.status}`;
    throw new Error(answer.status === 429 ? `The service is busy; try again in a moment. (${said})` : said);
  }
  $("key").hidden = true;
  return content;
}

// Only what is new, so that a screen reader does not say it again.
function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function say(id, text, wrong = false) {
  write($(id), text);
  $(id).classList.toggle("wrong", wrong);
}

function make(name, text = "", kind = "") {
  const element = document.createElement(name);
  element.textContent = text;
  if (kind) element.className = kind;
  return element;
}

// A picture that was chosen or dropped: its base64, or null.
function picker(name, changed) {
  const drop = $(`${name}-drop`), field = $(`${name}-file`), shown = $(`${name}-shown`), image = shown.querySelector("img");
  const state = { base64: null };
  let taken = 0;

  async function take(file) {
    if (!file) return;
    const own = ++taken;
    if (file.size > MOST_BYTES) return say(`${name}-said`, `${file.name} has over 20 MiB, which is too much.`, true);
    const bytes = new Uint8Array(await file.arrayBuffer());
    if (own !== taken) return; // another one was chosen meanwhile
    let letters = "";
    for (let at = 0; at < bytes.length; at += 32768) letters += String.fromCharCode(...bytes.subarray(at, at + 32768));
    state.base64 = btoa(letters);
    URL.revokeObjectURL(image.src);
    image.src = URL.createObjectURL(file);
    shown.hidden = false;
    changed();
  }

  state.clear = () => {
    state.base64 = null;
    shown.hidden = true;
    field.value = "";
  };
  field.addEventListener("change", () => take(field.files[0]));
  for (const kind of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragover");
      if (kind === "drop") take(event.dataTransfer.files[0]);
    });
  }
  return state;
}

// --- search

let query = null;
let asked = 0; // answers that come too late belong to an older question

const searched = picker("search", () => begin());

function begin() {
  const parts = [];
  if ($("query").value.trim()) parts.push({ text: $("query").value.trim() });
  if (searched.base64) parts.push({ image: searched.base64 });
  if (!parts.length) return say("search-said", "Write something, or choose a picture.", true);
  start(parts);
}

function start(parts) {
  query = parts;
  $("results").replaceChildren();
  more();
}

async function more() {
  const own = ++asked, list = $("results");
  say("search-said", "searching…");
  $("more").disabled = true;
  if (!list.children.length) $("more").hidden = true;
  try {
    const answer = await ask("v1/search", { query, limit: PAGE + 1, offset: list.children.length, thumbnails: true });
    if (own !== asked) return;
    for (const result of answer.results.slice(0, PAGE)) list.append(shown(result));
    say("search-said", list.children.length ? `${list.children.length} pictures, best first` : "Nothing was found.");
    $("more").hidden = answer.results.length <= PAGE; // one more was asked for, to know
  } catch (error) {
    if (own === asked) say("search-said", error.message, true);
  } finally {
    if (own === asked) $("more").disabled = false;
  }
}

function shown(result) {
  const item = make("li"), name = String(result.id);
  const thumbnail = result.payload.thumbnail;
  let picture = make("span", "", "none");
  if (typeof thumbnail === "string" && /^[A-Za-z0-9+/=]+$/.test(thumbnail)) {
    picture = make("img");
    picture.src = `data:image/jpeg;base64,${thumbnail}`;
    picture.alt = name;
  }
  const like = make("button", "More like this");
  like.type = "button";
  like.setAttribute("aria-label", `More like ${name}`);
  like.addEventListener("click", () => {
    $("query").value = "";
    searched.clear();
    start([{ id: name }]);
    $("search").focus();
  });
  item.append(picture, make("span", name, "name"), make("span", result.score.toFixed(3), "score"), like);
  return item;
}

$("search-form").addEventListener("submit", (event) => {
  event.preventDefault();
  begin();
});
$("search-clear").addEventListener("click", () => searched.clear());
$("more").addEventListener("click", more);

// --- zero-shot

const labelled = picker("zero", () => compare());
let compared = 0;

async function compare() {
  const labels = $("labels").value.split(",").map((label) => label.trim()).filter(Boolean);
  if (!labelled.base64) return say("zero-said", "Choose a picture first.", true);
  if (!labels.length) return say("zero-said", "Write some labels.", true);
  const own = ++compared;
  say("zero-said", "comparing…");
  try {
    const answer = await ask("v1/rank", { query: { image: labelled.base64 }, candidates: labels });
    if (own !== compared) return;
    $("bars").replaceChildren(...answer.results.map((result) => bar(labels[result.index], result.probability)));
    say("zero-said", "");
  } catch (error) {
    if (own !== compared) return;
    $("bars").replaceChildren();
    say("zero-said", error.message, true);
  }
}

function bar(label, probability) {
  const item = make("li"), meter = make("meter"), percent = `${(100 * probability).toFixed(1)}%`;
  meter.max = 1;
  meter.value = probability;
  meter.setAttribute("aria-label", `${label}: ${percent}`);
  item.append(make("span", label), meter, make("span", percent));
  return item;
}

$("zero-form").addEventListener("submit", (event) => {
  event.preventDefault();
  compare();
});

// --- live

async function look() {
  try {
    const now = await ask("v1/stats");
    write($("state"), `${now.model.id}, ${now.model.dimension} dimensions, ${now.model.precision} on ${now.model.engine}`);
    if (!now.search && !query) say("search-said", "This service searches no collection yet: make one with `clipfleet index`, and start it with --index.");
    const rows = [
      ["images a second", now.items_per_second.image.toFixed(1)],
      ["texts a second", now.items_per_second.text.toFixed(1)],
      ["images in flight", now.in_flight.image],
      ["texts in flight", now.in_flight.text],
      ["images in a batch", now.batch.image?.toFixed(1) ?? "–"],
      ["texts in a batch", now.batch.text?.toFixed(1) ?? "–"],
      ...Object.entries(now.replicas).map(([name, count]) => [`replicas of ${name}`, count]),
    ];
    $("live").replaceChildren(...rows.map(([name, value]) => {
      const box = make("div");
      box.append(make("dt", name), make("dd", String(value)));
      return box;
    }));
  } catch (error) {
    write($("state"), error.message);
  }
}

async function watch() {
  for (;;) {
    if (!document.hidden) await look();
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = $("key-field").value.trim();
  if (!/^[\x21-\x7e]+$/.test(given)) return write($("state"), "This is no API key: it holds characters that none has.");
  key = given;
  try {
    sessionStorage.setItem("clipfleet-key", key);
  } catch {
    // as above
  }
  look();
});
watch();
