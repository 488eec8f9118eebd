"use strict";
// The page of `duologue inspect`. An index of all dialogues is unpacked at the beginning; words and numbers of
// a part when one of its dialogues is shown. All text of the run enters the page by textContent alone.
(() => {
  const $ = (id) => document.getElementById(id);
  const ROW = 56; // pixels of a row of the list
  const MINUS = "\u2212";
  let about, list, pieces, perPart, size;
  let groups; // group -> dialogues
  let shown = []; // dialogues that the filter leaves, in their order
  let chosen = -1; // the dialogue that is shown
  let dialogue = null; // its words and columns
  let token = -1; // the token that the cursor is at
  let measure = "logprob";
  let filterRun = 0;

  // ---- data -----------------------------------------------------------------------------------------------

  async function unpacked(id) {
    const text = $(id).textContent;
    const bytes = Uint8Array.fromBase64
      ? Uint8Array.fromBase64(text)
      : Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).arrayBuffer();
  }

  async function object(id) {
    return JSON.parse(new TextDecoder().decode(await unpacked(id)));
  }

  const wordsKept = new Map();
  const numbersKept = new Map();

  function words(part) {
    if (!wordsKept.has(part)) wordsKept.set(part, object("words-" + part));
    return wordsKept.get(part);
  }

  function numbers(part) {
    if (!numbersKept.has(part)) {
      if (numbersKept.size > 24) numbersKept.delete(numbersKept.keys().next().value);
      numbersKept.set(part, unpacked("numbers-" + part));
    }
    return numbersKept.get(part);
  }

  // A dialogue: its words, and for each of its tokens {piece, side, turn, logprob, ..}.
  async function read(i) {
    const part = Math.floor(i / perPart);
    const [[places, all], buffer] = await Promise.all([words(part), numbers(part)]);
    const own = all[i % perPart];
    const columns = {};
    let total = 0;
    for (const turn of own.turns) total += turn.n;
    for (const [name, [at, width]] of Object.entries(places)) {
      const kind = width === 4 ? Float32Array : Float64Array;
      columns[name] = new kind(buffer, at + width * own.start, total);
    }
    const tokens = [];
    own.turns.forEach((turn, t) => {
      for (let k = 0; k < turn.n; k++) {
        const at = tokens.length;
        const [id, text] = pieces[columns.piece[at]];
        const row = {
          id,
          text,
          turn: t,
          side: turn.side,
          kind: turn.kind,
          why: turn.why,
          version: own.version,
        };
        for (const name of ["logprob", "entropy", "support", "other"]) {
          const value = columns[name] ? columns[name][at] : NaN;
          row[name] = Number.isNaN(value) ? null : value;
        }
        row.trained = turn.why === "";
        row.advantage = row.trained ? turn.advantage : null;
        tokens.push(row);
      }
    });
    return { i, ...own, tokens };
  }

  // ---- words ----------------------------------------------------------------------------------------------

  function el(tag, props, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(props || {})) {
      if (key === "class") node.className = value;
      else if (key === "text") node.textContent = value;
      else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined) node.setAttribute(key, value);
    }
    node.append(...children);
    return node;
  }

  const signed = (text) => text.replace("-", MINUS);
  const fixed = (x, n) => (x === null || x === undefined ? "–" : signed(x.toFixed(n)));
  const plus = (x, n) => (x > 0 ? "+" : "") + fixed(x, n);
  const share = (x) => (x >= 0.9995 ? (100 * x).toFixed(2) : (100 * x).toPrecision(3)) + "%";
  const many = (n, one, more) => n.toLocaleString("en") + " " + (n === 1 ? one : more || one + "s");
  const isTraining = (i) => list.stage[i] === "selfplay";
  const isCompared = (i) => list.stage[i] === "checkpoints";
  const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "·");

  function rewards(i) {
    const [a, b] = [list.reward0[i], list.reward1[i]];
    if (a === null) return "no reward";
    return a === b ? fixed(a, 2) : fixed(a, 2) + " : " + fixed(b, 2);
  }

  const policyName = (i) => list.policy[i].replaceAll("_", " ");

  function place(i) {
    const members = groups.get(list.group[i]);
    const member = members.indexOf(i) + 1;
    const of = list.number[i] + 1;
    if (list.stage[i] === "selfplay")
      return (
        "step " +
        list.step[i] +
        (list.dropped[i] ? ", dropped group " : ", group ") +
        of +
        (", dialogue " + member + " of " + members.length)
      );
    return (
      (isCompared(i) ? "checkpoint " + list.policy[i] : "evaluation of " + policyName(i)) + ", context " + of
    );
  }

  // ---- measures -------------------------------------------------------------------------------------------

  // Each: title, how a value is written, its [class, strength from 0 to 1], steps of the legend.
  const heat = (x) => ["heat", Math.min(Math.max(x, 0), 1)];
  const both = (x) => [x < 0 ? "minus" : "plus", Math.min(Math.abs(x), 1)];
  const MEASURES = {
    logprob: {
      title: "log-prob",
      say: (x) => fixed(x, 4),
      colour: (x) => heat(-x / 3.5),
      legend: [0, -0.7, -1.4, -2.1, -2.8, -3.5],
      step: (x) => (x === 0 ? "p = 1" : (100 * Math.exp(x)).toFixed(0) + "%"),
    },
    entropy: {
      title: "entropy",
      say: (x) => fixed(x, 4) + " nats",
      colour: (x) => heat(x / 2.5),
      legend: [0, 0.5, 1, 1.5, 2, 2.5],
      step: (x) => String(x),
    },
    advantage: {
      title: "advantage",
      say: (x) => plus(x, 4),
      colour: (x) => both(x / advantageScale()),
      legend: null,
      step: (x) => plus(x, 2),
    },
    trained: {
      title: "trained",
      say: (x) => (x ? "yes" : "no"),
      colour: (x) => ["plus", x ? 0.8 : 0],
      legend: [1, 0],
      step: (x) => (x ? "trained" : "not"),
    },
    support: {
      title: "support size",
      say: (x) => (x === 0 ? "all tokens" : many(x, "token")),
      colour: (x) => heat(x === 0 ? 1 : Math.log10(x) / 5),
      legend: [1, 10, 100, 1000, 0],
      step: (x) => (x === 0 ? "all" : String(x)),
    },
    version: {
      title: "weights version",
      say: (x) => String(x),
      colour: () => ["plus", 0.35],
      legend: null,
      step: (x) => String(x),
    },
    change: {
      title: "change of log-prob",
      say: (x) => plus(x, 4),
      colour: (x) => both(x / 2),
      legend: [-2, -1, 0, 1, 2],
      step: (x) => plus(x, 0),
    },
  };

  function advantageScale() {
    const most = Math.max(...(dialogue ? dialogue.tokens : []).map((t) => Math.abs(t.advantage || 0)), 0);
    return most || 1;
  }

  function value(t, name) {
    if (name === "change") return t.other === null ? null : t.other - t.logprob;
    return t[name] === undefined ? null : t[name];
  }

  function paint(node, t) {
    const x = value(t, measure);
    const [kind, strength] = x === null ? ["none", 0] : MEASURES[measure].colour(x);
    node.className = "t " + kind;
    node.style.setProperty("--v", strength.toFixed(3));
  }

  function paintAll() {
    for (const node of document.querySelectorAll("#talk .t, #columns .t")) paint(node, node.token);
    if (token >= 0) spans()[token].classList.add("at");
    const legend = $("legend");
    legend.replaceChildren();
    const m = MEASURES[measure];
    let steps = m.legend;
    if (measure === "advantage") steps = [-1, 0, 1].map((x) => x * advantageScale());
    if (measure === "version") steps = dialogue ? [dialogue.version] : [];
    for (const x of steps) {
      const [kind, strength] = m.colour(x);
      const node = el("span", { class: "t " + kind, text: m.step(x) });
      node.style.setProperty("--v", strength.toFixed(3));
      legend.append(node);
    }
    if (dialogue && dialogue.tokens.some((t) => value(t, measure) === null))
      legend.append(el("span", { class: "t none", text: "none" }));
  }

  function offerMeasures() {
    const r = about.recorded;
    const there = { entropy: r.entropy, support: r.entropy, change: r.other };
    for (const [name, m] of Object.entries(MEASURES)) {
      if (name === "change" && !r.other) continue;
      const missing = name in there && !there[name];
      $("measure").append(
        el("option", {
          value: name,
          text: m.title + (missing ? " (not recorded)" : ""),
          disabled: missing ? "" : null,
        }),
      );
    }
    $("measure").value = measure;
  }

  // ---- the list -------------------------------------------------------------------------------------------

  function drawList() {
    const box = $("list");
    $("rows").style.height = shown.length * ROW + "px";
    const first = Math.max(Math.floor(box.scrollTop / ROW) - 4, 0);
    const last = Math.min(first + Math.ceil(box.clientHeight / ROW) + 9, shown.length);
    const rows = [];
    for (let at = first; at < last; at++) {
      const i = shown[at];
      const agreed = list.agreed[i];
      const row = el(
        "div",
        {
          class: "row",
          role: "option",
          id: "row-" + i,
          "aria-setsize": shown.length,
          "aria-posinset": at + 1,
          "aria-selected": i === chosen,
        },
        el("b", null, el("span", { text: place(i) }), el("span", { text: rewards(i) })),
        el(
          "p",
          null,
          el("span", { class: agreed ? "yes" : "no", text: agreed ? "✓ " : "✗ " }),
          el("span", { class: "hidden", text: list.verdict[i] + ". " }),
          list.head[i],
        ),
      );
      row.style.top = at * ROW + "px";
      row.addEventListener("click", () => choose(i));
      rows.push(row);
    }
    $("rows").replaceChildren(...rows);
    if (chosen >= 0) box.setAttribute("aria-activedescendant", "row-" + chosen);
  }

  function scrollToChosen() {
    const at = shown.indexOf(chosen);
    if (at < 0) return;
    const box = $("list");
    if (at * ROW < box.scrollTop) box.scrollTop = at * ROW;
    else if ((at + 1) * ROW > box.scrollTop + box.clientHeight)
      box.scrollTop = (at + 1) * ROW - box.clientHeight;
  }

  function options(select, all, values) {
    select.replaceChildren(
      el("option", { value: "", text: all }),
      ...values.map(([key, text]) => el("option", { value: key, text })),
    );
  }

  const stepKey = (i) => list.stage[i] + " " + list.step[i] + " " + list.policy[i];

  function offerFilters() {
    const steps = new Map();
    for (let i = 0; i < size; i++) {
      const of = isCompared(i) ? "checkpoint " + list.policy[i] : "evaluation of " + policyName(i);
      steps.set(stepKey(i), isTraining(i) ? "step " + list.step[i] : of);
    }
    options($("step"), "all", [...steps]);
    const names = (values) => [...new Set(values)].sort().map((x) => [x, x]);
    const kinds = names(list.verdict.map(outcomeKind));
    options($("outcome"), "any", [["+", "agreed"], ["-", "not agreed"], ...kinds]);
    options($("players"), "any", names(list.players));
  }

  // Verdicts differ by their numbers; without them there are few kinds.
  function outcomeKind(verdict) {
    return verdict.replace(/[-\d.]+/g, "n");
  }

  async function matching(text, where) {
    const found = new Set();
    const needle = text.toLowerCase();
    const run = filterRun;
    for (let part = 0; part * perPart < size; part++) {
      const [, all] = await words(part);
      if (run !== filterRun) return null;
      all.forEach((d, k) => {
        const said =
          where === "" || where === "0" || where === "1"
            ? d.turns.filter((t) => where === "" || String(t.side) === where).map((t) => t.text)
            : [];
        const told = where === "" || where === "told" ? [...d.told, d.shared || "", d.id] : [];
        if (said.concat(told).join("\n").toLowerCase().includes(needle)) found.add(part * perPart + k);
      });
    }
    return found;
  }

  async function filter() {
    filterRun += 1;
    const run = filterRun;
    const text = $("text").value.trim();
    const found = text ? await matching(text, $("where").value) : null;
    if (run !== filterRun) return;
    const [step, outcome, players, of] = ["step", "outcome", "players", "reward-of"].map((id) => $(id).value);
    const number = $("number").value;
    const [least, most] = ["least", "most"].map((id) => ($(id).value === "" ? null : Number($(id).value)));
    const reward = rewardOf(of);
    shown = [];
    for (let i = 0; i < size; i++) {
      if (found && !found.has(i)) continue;
      if (step && step !== stepKey(i)) continue;
      if (number && Number(number) !== list.number[i] + 1) continue;
      if (
        outcome === "+"
          ? !list.agreed[i]
          : outcome === "-"
            ? list.agreed[i]
            : outcome && outcome !== outcomeKind(list.verdict[i])
      )
        continue;
      if (players && players !== list.players[i]) continue;
      const worth = reward(i);
      if (
        (least !== null && !(worth !== null && worth >= least)) ||
        (most !== null && !(worth !== null && worth <= most))
      )
        continue;
      shown.push(i);
    }
    sortShown($("sort").value, reward);
    if (!shown.includes(chosen) && shown.length) await choose(shown[0]);
    if (run !== filterRun) return;
    scrollToChosen();
    drawList();
    $("count").textContent =
      shown.length === size
        ? many(size, "dialogue")
        : many(shown.length, "dialogue") + " of " + size.toLocaleString("en");
    $("count").dataset.run = run;
  }

  function rewardOf(of) {
    if (of !== "both") return (i) => list["reward" + of][i];
    return (i) => (list.reward0[i] === null ? null : (list.reward0[i] + list.reward1[i]) / 2);
  }

  function sortShown(order, reward) {
    const [key, way] = order.split("-");
    if (key === "played") return;
    const by = key === "reward" ? reward : (i) => list[key][i];
    const sign = way === "up" ? 1 : -1;
    const last = (x) => (x === null ? Infinity : sign * x); // unknown ones come last
    shown.sort((a, b) => last(by(a)) - last(by(b)) || a - b);
  }

  // ---- a dialogue -----------------------------------------------------------------------------------------

  async function choose(i) {
    chosen = i;
    const read_ = await read(i);
    if (chosen !== i) return;
    dialogue = read_;
    token = -1;
    history.replaceState(null, "", "#" + i);
    draw();
    scrollToChosen();
    drawList();
    $("said").textContent = place(i) + ": " + dialogue.verdict + ", reward " + rewards(i);
  }

  function spans() {
    return [...document.querySelectorAll("#talk .t")];
  }

  function talk(d, into, onToken) {
    let at = 0;
    d.turns.forEach((turn) => {
      const say = el("div", { class: "say r" + turn.side + " " + turn.kind });
      const does = turn.kind === "final" ? " states" : turn.kind === "prompt" ? " hears" : "";
      say.append(
        el("span", {
          class: "who",
          text:
            d.sides[turn.side] + does + (turn.why && isTraining(d.i) ? " · not trained: " + turn.why : ""),
        }),
      );
      if (!turn.n) say.append(turn.text);
      for (let k = 0; k < turn.n; k++, at++) {
        const t = d.tokens[at];
        const text = k === 0 ? t.text.trimStart() : t.text;
        const span = el("span", { class: "t", text: text || "⏎" });
        span.token = t;
        if (onToken) {
          const here = at;
          span.addEventListener("mouseenter", () => tell(here));
          span.addEventListener("click", () => tell(here, true));
        } else {
          span.addEventListener("mouseenter", () => {
            span.title = titleOf(t);
          });
        }
        say.append(span);
      }
      into.append(say);
    });
  }

  function fact(key, text) {
    return el("div", null, el("dt", { text: key }), el("dd", { text }));
  }

  function draw() {
    const d = dialogue;
    const i = d.i;
    $("title").textContent = place(i)[0].toUpperCase() + place(i).slice(1);
    const trained = d.tokens.filter((t) => t.trained).length;
    $("facts").replaceChildren(
      fact("reward", rewards(i)),
      fact("advantage", advantages(d)),
      fact("tokens", many(d.tokens.length, "token") + ", " + trained + " trained"),
      fact("mean log-prob", fixed(list.logprob[i], 3)),
      fact("weights version", d.version === null ? "–" : String(d.version)),
      fact("sides", d.players.join(" and ")),
      fact("context", d.id + " (" + d.split + ")"),
    );
    $("shared").textContent = d.shared || "";
    $("told").replaceChildren(
      ...d.told.map((text, side) => el("div", null, el("b", { text: d.sides[side] || "" }), text)),
    );
    $("talk").replaceChildren();
    $("talk").className = "talk";
    talk(d, $("talk"), true);
    $("verdict").replaceChildren(
      el("b", { class: list.agreed[i] ? "yes" : "no", text: d.verdict }),
      ...d.measures.map((text) => el("span", { text })),
    );
    drawJudge(d);
    drawGroup(i);
    drawTable();
    drawToken();
    paintAll();
    $("dialogue").scrollTop = 0;
  }

  function advantages(d) {
    const of = [0, 1].map((side) => {
      const own = d.turns.filter((t) => t.side === side && t.why === "" && t.advantage !== null);
      const values = new Set(own.map((t) => t.advantage));
      return values.size ? (values.size > 1 ? "by turn" : plus(own[0].advantage, 3)) : "–";
    });
    return of[0] === of[1] ? of[0] : of.join(" : ");
  }

  // A prompt with its places filled, all at once: what looks like a place in a text stays text.
  const question = (a) => about.prompts[a.kind].replace(/\{(\w+)\}/g, (_, name) => a.places[name]);

  function drawJudge(d) {
    const asked = d.asked || [];
    $("judge").hidden = !asked.length && !d.reason;
    const rows = asked.map((a) =>
      el(
        "article",
        null,
        el("h4", {
          text: a.kind + ", after " + many(a.turns, "turn") + ": waited " + fixed(a.seconds, 2) + " s",
        }),
        ...(a.places
          ? [el("details", null, el("summary", { text: "the question" }), el("pre", { text: question(a) }))]
          : []),
        el("pre", { text: a.answer === null ? "no valid answer" : JSON.stringify(a.answer, null, 1) }),
      ),
    );
    if (!asked.length && d.reason)
      rows.push(el("article", null, el("h4", { text: "reason" }), el("pre", { text: d.reason })));
    $("asked").replaceChildren(...rows);
  }

  function drawGroup(i) {
    const members = groups.get(list.group[i]);
    $("group").hidden = members.length < 2;
    $("group-heading").textContent = isTraining(i) ? "The group" : "The same context by others";
    const head = ["dialogue", "reward", "outcome", "tokens", "mean log-prob"];
    const rows = members.map((j, k) => {
      const name = isTraining(j) ? String(k + 1) : isCompared(j) ? list.policy[j] : policyName(j);
      const button = el("button", {
        type: "button",
        text: name,
        "aria-label": place(j),
        onclick: () => choose(j),
      });
      const cells = [rewards(j), list.verdict[j], list.tokens[j], fixed(list.logprob[j], 3)].map((text) =>
        el("td", { text }),
      );
      return el("tr", { "aria-current": j === i ? "true" : null }, el("td", null, button), ...cells);
    });
    $("members").replaceChildren(
      el("caption", { class: "hidden", text: "The dialogues of this group" }),
      el("thead", null, el("tr", null, ...head.map((text) => el("th", { scope: "col", text })))),
      el("tbody", null, ...rows),
    );
    drawBeside();
  }

  // The token at which the dialogues of a pair go apart, -1 for two that are the same.
  function parting(all) {
    const [a, b] = all.map((d) => d.tokens);
    const n = Math.min(a.length, b.length);
    for (let k = 0; k < n; k++) if (a[k].id !== b[k].id || a[k].turn !== b[k].turn) return k;
    return a.length === b.length ? -1 : n;
  }

  function mean(values) {
    const known = values.filter((x) => x !== null);
    return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
  }

  async function drawBeside() {
    const box = $("columns");
    box.replaceChildren();
    if (!$("beside").open || $("group").hidden) return;
    const i = chosen;
    const all = await Promise.all(groups.get(list.group[i]).map(read));
    if (chosen !== i) return;
    const apart = !isTraining(i) && all.length === 2 ? parting(all) : -1;
    box.replaceChildren(
      ...all.map((d) => {
        const article = el(
          "article",
          { class: d.i === i ? "here" : "" },
          el("h4", { text: place(d.i) + " · reward " + rewards(d.i) }),
        );
        const column = el("div", { class: "talk" });
        talk(d, column, false);
        if (apart >= 0 && apart < d.tokens.length)
          column
            .querySelectorAll(".t")
            [apart].before(el("mark", { class: "apart", text: "from here they differ" }));
        article.append(column, el("p", { class: list.agreed[d.i] ? "yes" : "no", text: d.verdict }));
        if (isCompared(d.i)) {
          const by =
            fixed(mean(d.tokens.map((t) => t.logprob)), 3) +
            " by itself, " +
            fixed(mean(d.tokens.map((t) => t.other)), 3) +
            " by the other";
          article.append(el("p", { class: "soft", text: "mean log-prob " + by }));
        }
        return article;
      }),
    );
    paintAll();
  }

  // ---- a token --------------------------------------------------------------------------------------------

  function numbersOf(t) {
    const r = about.recorded;
    const rows = [
      [
        "log-prob",
        t.logprob === null ? "–" : fixed(t.logprob, 5) + ", p " + share(Math.exp(t.logprob)),
        t.logprob === null ? t.why : String(t.logprob),
      ],
      [
        "entropy",
        t.entropy === null ? "–" : fixed(t.entropy, 5) + " nats",
        t.entropy === null ? "not recorded" : String(t.entropy),
      ],
      [
        "advantage",
        t.advantage === null ? "–" : plus(t.advantage, 5),
        t.advantage === null ? t.why || "none" : String(t.advantage),
      ],
      ["trained", t.trained ? "yes" : "no", t.why],
      [
        "support",
        t.support === null ? "–" : MEASURES.support.say(t.support),
        t.support === null ? "not recorded" : "",
      ],
      ["weights version", t.version === null ? "–" : String(t.version), ""],
    ];
    if (r.other)
      rows.push([
        "log-prob by the other",
        fixed(t.other, 5),
        t.other === null ? "" : plus(t.other - t.logprob, 5) + " to this one's",
      ]);
    return rows;
  }

  const titleOf = (t) =>
    numbersOf(t)
      .map(([key, text]) => key + " " + text)
      .join("\n");

  function drawToken() {
    const box = $("token");
    if (token < 0) {
      box.replaceChildren(
        el("p", { class: "soft", text: "Point at a token, or go from one to the next with the arrow keys." }),
      );
      return;
    }
    const t = dialogue.tokens[token];
    const dl = el("dl");
    const what = [
      [
        "id",
        String(t.id),
        "token " + (token + 1) + " of " + dialogue.tokens.length + ", turn " + (t.turn + 1),
      ],
    ];
    for (const [key, text, small] of [...what, ...numbersOf(t)]) {
      const dd = el("dd", { text, "data-key": key });
      if (small) dd.append(el("small", { text: small }));
      dl.append(el("div", null, el("dt", { text: key }), dd));
    }
    box.replaceChildren(el("div", { class: "piece", text: t.text ? visible(t.text) : "⏎ (no text)" }), dl);
  }

  // `aloud`: by the keyboard or a click, so that a screen reader hears it.
  function tell(at, aloud) {
    token = at;
    for (const node of document.querySelectorAll("#talk .t.at, #tokens .at")) node.classList.remove("at");
    const span = spans()[at];
    span.classList.add("at");
    if ($("table").open) $("tokens").tBodies[0].rows[at].classList.add("at");
    drawToken();
    if (!aloud) return;
    span.scrollIntoView({ block: "nearest" });
    const t = dialogue.tokens[at];
    $("said").textContent =
      "“" +
      (t.text.trim() || "end of turn") +
      "”: " +
      numbersOf(t)
        .slice(0, 4)
        .map(([key, text]) => key + " " + text)
        .join(", ");
  }

  function drawTable() {
    const table = $("tokens");
    table.replaceChildren();
    if (!$("table").open || !dialogue) return;
    const head = [
      "token",
      "id",
      "turn",
      "side",
      "log-prob",
      "p",
      "entropy",
      "advantage",
      "trained",
      "support",
      "version",
    ];
    if (about.recorded.other) head.push("other's log-prob");
    const rows = dialogue.tokens.map((t) => {
      const p = t.logprob === null ? "–" : share(Math.exp(t.logprob));
      const cells = [
        t.text ? visible(t.text) : "⏎",
        t.id,
        t.turn + 1,
        dialogue.sides[t.side],
        fixed(t.logprob, 5),
        p,
        fixed(t.entropy, 4),
      ];
      cells.push(
        t.advantage === null ? "–" : plus(t.advantage, 4),
        t.trained ? "yes" : "no",
        t.support === null ? "–" : t.support || "all",
        t.version,
      );
      if (about.recorded.other) cells.push(fixed(t.other, 5));
      return el("tr", null, ...cells.map((text) => el("td", { text })));
    });
    table.replaceChildren(
      el("caption", { class: "hidden", text: "All tokens of this dialogue" }),
      el("thead", null, el("tr", null, ...head.map((text) => el("th", { scope: "col", text })))),
      el("tbody", null, ...rows),
    );
  }

  // ---- what the numbers are -------------------------------------------------------------------------------

  function drawSources() {
    const r = about.recorded;
    const n = size.toLocaleString("en");
    const way = "train.record_tokens = n records them of every n-th step, and of evaluations.";
    const part = (count) =>
      (count
        ? "Recorded for " + count.toLocaleString("en") + " of " + n + " dialogues. "
        : "Not recorded by this run. ") + way;
    const rows = [
      [
        "Log-prob",
        "Recorded when the token was sampled, by the weights that sampled it, at the temperature of its draw (" +
          about.temperatures.join(" in training, ") +
          " in evaluations), over what it was drawn from." +
          (about.exact ? " In exact mode these are the trainer's log-probs, bit for bit." : ""),
      ],
      ["Entropy", "Of the distribution that the token was drawn from, in nats. " + part(r.entropy)],
      [
        "Support size",
        "How many tokens a draw was from, where top-k, top-p, min-p or a form of words leaves some out. " +
          part(r.entropy),
      ],
      [
        "Advantage",
        "Recorded for each side of a dialogue, or for each turn (grpo.credit); all its trained tokens have it.",
      ],
      [
        "Trained",
        "Computed here from the run's settings by the rule that masks rows: sampled by the policy, in a turn of grpo.train_kinds, on a side of grpo.train_roles, in a dialogue that is scored. Rows whose advantage is 0 count, but have no gradient unless a KL or entropy term is on.",
      ],
      [
        "Weights version",
        "Recorded for the dialogue: the step that played it. Weights never change within one.",
      ],
      [
        "Context",
        "What each side was told is recorded. A talk's template and questions to a side are not shown: they are never sampled.",
      ],
      [
        "Judge",
        "The answers, and the seconds that a dialogue waited for them, are recorded with tokens, here of " +
          many(r.asked, "dialogue") +
          ". A question is written again from the prompt files of the run, as they are now.",
      ],
    ];
    if (r.other) {
      const [a, b] = about.checkpoints;
      rows.push([
        "Two checkpoints",
        "Held by " +
          a +
          " and " +
          b +
          " when this page was made, each with itself, from the same contexts, seeds and openers; without a judge. Greedy draws have the log-probs of temperature 1. The log-prob by the other is that of its training forward over what the token was drawn from. Each one's own training forward gives the log-probs of its draws to within " +
          about.mismatch +
          ".",
      ]);
    }
    $("sources").replaceChildren(
      ...rows.flatMap(([key, text]) => [el("dt", { text: key }), el("dd", { text })]),
    );
  }

  // ---- keyboard and pointer -------------------------------------------------------------------------------

  function move(by) {
    const at = shown.indexOf(chosen);
    const next = at < 0 ? 0 : Math.min(Math.max(at + by, 0), shown.length - 1);
    if (shown.length && shown[next] !== chosen) choose(shown[next]);
  }

  function moveGroup(by) {
    let at = shown.indexOf(chosen);
    const group = list.group[chosen];
    while (at >= 0 && at < shown.length && list.group[shown[at]] === group) at += by;
    if (at < 0 || at >= shown.length) return;
    const next = list.group[shown[at]];
    while (by < 0 && at > 0 && list.group[shown[at - 1]] === next) at -= 1;
    choose(shown[at]);
  }

  function moveToken(by) {
    if (!dialogue || !dialogue.tokens.length) return;
    const next = token < 0 ? (by > 0 ? 0 : dialogue.tokens.length - 1) : token + by;
    if (next >= 0 && next < dialogue.tokens.length) tell(next, true);
  }

  function nextMeasure(by) {
    const names = [...$("measure").options].filter((o) => !o.disabled).map((o) => o.value);
    measure = names[(names.indexOf(measure) + by + names.length) % names.length];
    $("measure").value = measure;
    $("said").textContent = "coloured by " + MEASURES[measure].title;
    paintAll();
  }

  function toggle(id) {
    $(id).open = !$(id).open;
    if ($(id).open) $(id).scrollIntoView({ block: "nearest" });
  }

  const KEYS = {
    j: () => move(1),
    k: () => move(-1),
    ArrowDown: () => move(1),
    ArrowUp: () => move(-1),
    g: () => moveGroup(1),
    G: () => moveGroup(-1),
    ArrowRight: () => moveToken(1),
    ArrowLeft: () => moveToken(-1),
    l: () => moveToken(1),
    h: () => moveToken(-1),
    "/": () => {
      $("text").focus();
      $("text").select();
    },
    c: () => nextMeasure(1),
    C: () => nextMeasure(-1),
    s: () => toggle("beside"),
    t: () => toggle("table"),
    "?": () => $("help").showModal(),
  };

  function onKey(event) {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (event.key === "Escape" && typing) {
      $("list").focus();
      return;
    }
    if (typing || event.ctrlKey || event.metaKey || event.altKey || $("help").open || $("about").open) return;
    const inList = document.activeElement === $("list");
    const ends = { Home: -size, End: size, PageDown: 10, PageUp: -10 };
    const act = inList && event.key in ends ? () => move(ends[event.key]) : KEYS[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }

  function listen() {
    document.addEventListener("keydown", onKey);
    $("list").addEventListener("scroll", drawList);
    window.addEventListener("resize", drawList);
    let later = 0;
    $("filters").addEventListener("input", (event) => {
      clearTimeout(later);
      later = setTimeout(filter, event.target.id === "text" ? 120 : 0);
    });
    $("filters").addEventListener("reset", () => setTimeout(filter));
    $("filters").addEventListener("submit", (event) => {
      event.preventDefault();
      $("list").focus();
    });
    $("measure").addEventListener("input", () => {
      measure = $("measure").value;
      paintAll();
    });
    $("previous").addEventListener("click", () => move(-1));
    $("next").addEventListener("click", () => move(1));
    $("beside").addEventListener("toggle", drawBeside);
    $("table").addEventListener("toggle", drawTable);
    $("help-open").addEventListener("click", () => $("help").showModal());
    $("about-open").addEventListener("click", () => $("about").showModal());
    window.addEventListener("hashchange", () => choose(fromAddress()));
  }

  function fromAddress() {
    const i = Number(location.hash.slice(1) || 0);
    return Number.isInteger(i) && i >= 0 && i < size ? i : 0;
  }

  async function begin() {
    let index;
    [index, about] = await Promise.all([object("index"), object("about-data")]);
    ({ list, pieces, part: perPart } = index);
    size = list.step.length;
    groups = new Map();
    list.group.forEach((group, i) => {
      if (!groups.has(group)) groups.set(group, []);
      groups.get(group).push(i);
    });
    shown = [...list.step.keys()];
    offerMeasures();
    offerFilters();
    drawSources();
    listen();
    $("count").textContent = many(size, "dialogue");
    if (about.checkpoints.length) {
      $("beside").open = true;
      measure = $("measure").value = "change";
    }
    await choose(fromAddress());
    performance.mark("ready");
    document.documentElement.dataset.ready = "yes";
  }

  begin().catch((error) => {
    $("summary").textContent = "This browser cannot show the page: " + error;
  });
})();
