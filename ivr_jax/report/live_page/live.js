// Follows runs: asks for their state every few seconds and draws what has changed.
const $ = (id) => document.getElementById(id);
const EVERY = 3000; // milliseconds
const FIRST = ["reward", "loss", "exact", "images", "accuracy", "tokens_per_second", "grad_norm", "kl", "entropy"];
const SVG = "http://www.w3.org/2000/svg";
let runs = [];
const frames = new Map(); // run -> its gallery's frame

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function short(value) {
  const size = Math.abs(value);
  return size !== 0 && (size < 0.001 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

function ago(seconds) {
  return seconds < 120 ? `${Math.round(seconds)} s ago` : seconds < 7200 ? `${Math.round(seconds / 60)} min ago` : `${Math.round(seconds / 3600)} h ago`;
}

function showRuns() {
  $("runs").replaceChildren(...runs.map((run, index) => {
    const card = make("article", "card");
    card.append(make("h2", `c${index % 6}`, run.name));
    if (run.error) return card.append(make("p", "alarm", run.error)), card;
    const rate = run.curves.tokens_per_second?.at(-1);
    card.append(make("p", "", `step ${run.step}${run.steps ? ` of ${run.steps}` : ""}${rate ? ` · ${short(rate[1])} tokens/s` : ""}`));
    card.append(make("p", "muted", [run.stage, `last line ${ago(run.age)}`].filter(Boolean).join(" · ")));
    if (run.alarms.length) {
      const line = make("p");
      line.append(...run.alarms.map((name) => make("span", "alarm", name.replaceAll("_", " "))));
      card.append(line);
    }
    for (const [name, value] of Object.entries(run.judge)) card.append(make("p", "muted", `${name.replaceAll("_", " ")} ${short(value)}`));
    return card;
  }));
}

function chart(name) {
  const series = runs.map((run, index) => ({ points: run.curves[name] ?? [], index })).filter(({ points }) => points.length);
  const xs = series.flatMap(({ points }) => points.map(([x]) => x)), ys = series.flatMap(({ points }) => points.map(([, y]) => y));
  const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const card = make("figure", "card"), svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 100 100");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${name} from ${short(low)} to ${short(high)}`);
  for (const { points, index } of series) {
    const line = document.createElementNS(SVG, "polyline");
    line.setAttribute("class", `c${index % 6}`);
    line.setAttribute("points", points.map(([x, y]) => `${(100 * (x - left)) / (right - left || 1)},${high > low ? 96 - (92 * (y - low)) / (high - low) : 50}`).join(" "));
    svg.append(line);
  }
  const range = make("div", "range"), last = make("span", "last");
  last.append(...series.map(({ points, index }) => make("span", `c${index % 6}`, short(points.at(-1)[1]))));
  range.append(make("span", "", `${short(low)} – ${short(high)}`), make("span", "", `steps ${short(left)} – ${short(right)}`), last);
  card.append(make("h2", "", name.replaceAll("_", " ")), svg, range);
  return card;
}

function showCharts() {
  const wanted = $("filter").value.trim().toLowerCase().split(/\s+/).filter(Boolean);
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.curves)))].filter((name) => !name.startsWith("alarm_"));
  const rank = (name) => { const place = FIRST.findIndex((first) => name.startsWith(first)); return place < 0 ? FIRST.length : place; };
  const shown = names.filter((name) => !wanted.length || wanted.some((word) => name.includes(word)));
  shown.sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
  $("charts").replaceChildren(...shown.map(chart));
}

function showGalleries() {
  for (const run of runs.filter((one) => one.gallery)) {
    const address = `/gallery/${run.name.split("/").map(encodeURIComponent).join("/")}/${run.gallery}`;
    let frame = frames.get(run.name);
    if (!frame) {
      frame = make("iframe");
      frame.title = `Newest rollouts of ${run.name}`;
      frame.setAttribute("sandbox", "allow-scripts");
      frames.set(run.name, frame);
      $("galleries").append(make("h2", "", frame.title), frame);
    }
    if (frame.dataset.address !== address) frame.src = frame.dataset.address = address;
  }
}

async function follow() {
  try {
    const answer = await fetch("/state.json", { cache: "no-store" });
    runs = (await answer.json()).runs;
    $("status").textContent = "";
    showRuns();
    showCharts();
    showGalleries();
    document.body.dataset.ready = "true";
  } catch {
    $("status").textContent = "The server does not answer; what is shown is not new.";
  }
  setTimeout(follow, EVERY);
}

$("filter").addEventListener("input", showCharts);
follow();
