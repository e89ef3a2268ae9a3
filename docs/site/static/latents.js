{
  const home = document.getElementById("touch-latents"), detail = el("section", { "aria-live": "polite" });
  const personas = Object.keys(LATENTS[0].auroc);
  const keep = { persona: "villain", text: "" };
  const named = (r) => `latent ${r.latent}${r.name ? `, ${r.name}` : ""}`;
  const svg = (name, about, ...children) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [k, v] of Object.entries(about)) k.startsWith("on") ? made.addEventListener(k.slice(2), v) : made.setAttribute(k, v);
    made.append(...children);
    return made;
  };
  function plot(rows) {
    const W = 640, H = 320, left = 48, low = 34, rises = LATENTS.map((r) => r.rise);
    const [a, b] = [Math.min(...rises), Math.max(...rises)], root = (x) => Math.sign(x) * Math.sqrt(Math.abs(x));
    const x = (v) => left + ((root(v) - root(a)) / (root(b) - root(a))) * (W - left - 20);
    const y = (v) => H - low - v * (H - low - 12);
    const made = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "group", "aria-label": `Rise of each latent against how well it marks the ${keep.persona}` });
    for (const t of [0, 0.25, 0.5, 0.75, 1]) made.append(svg("line", { x1: left, x2: W - 20, y1: y(t), y2: y(t), stroke: "currentColor", "stroke-opacity": 0.15 }),
      svg("text", { x: left - 6, y: y(t) + 4, "text-anchor": "end" }, String(t)));
    for (const t of [-1, -0.1, 0, 0.1, 0.5, 1, 2, 3].filter((t) => t >= a && t <= b)) made.append(svg("text", { x: x(t), y: H - low + 16, "text-anchor": "middle" }, String(t)));
    made.append(svg("text", { x: W / 2, y: H - 3, "text-anchor": "middle" }, "rise from correct to obviously wrong fine-tunes (square-root scale)"),
      svg("text", { x: 12, y: H / 2, transform: `rotate(-90 12 ${H / 2})`, "text-anchor": "middle" }, `AUROC for the ${keep.persona}`));
    for (const r of rows) {
      const go = () => { location.hash = r.latent; };
      made.append(svg("circle", { cx: x(r.rise), cy: y(r.auroc[keep.persona]), r: r.name ? 7 : 4, fill: r.name ? "#882255" : "#44AA99", tabindex: 0, role: "link",
        "aria-label": named(r), onclick: go, onkeydown: (e) => e.key === "Enter" && go() }, svg("title", {}, named(r))));
    }
    return made;
  }
  function passage(p) {
    const top = Math.max(...p.values, 1e-6);
    return el("p", { class: "passage" }, ...p.tokens.map((t, i) =>
      el("span", { style: `background: rgba(213, 94, 0, ${(0.6 * p.values[i]) / top})`, title: number(p.values[i], 2) }, t.replaceAll("\n", "↵ "))));
  }
  function bars(pairs, digits) {
    const most = Math.max(...pairs.map(([, v]) => Math.abs(v)), 1e-9);
    return el("div", { class: "bars" }, ...pairs.flatMap(([name, v]) => [el("span", {}, name),
      el("i", { class: v < 0 ? "down" : "up", style: `width: ${(100 * Math.abs(v)) / most}%` }), el("span", { class: "number" }, number(v, digits))]));
  }
  function open() {
    const r = LATENTS.find((l) => String(l.latent) === location.hash.slice(1));
    if (!r) return detail.replaceChildren();
    const s = r.steered;
    detail.replaceChildren(el("h2", {}, named(r)),
      el("p", {}, `Rank ${r.rank} by rise from correct to obviously wrong fine-tunes (${number(r.rise, 3)}; from the original model ${number(r["rise from original"], 3)}). Active on ${number(r.fires, 2)} % of tokens.`),
      el("p", {}, s ? `Steered in the search (${s.kind}): at dose ${s.dose}, its best, ${number(s.misaligned, 0)} % of ${s.answers} answers were misaligned and ${number(s.broken, 0)} % broken or absurd.` : "Not steered."),
      el("h3", {}, "Where it is most active"), ...r.passages.map(passage),
      el("h3", {}, "What it pushes towards (logit lens)"), el("p", {}, el("b", {}, "raises "), r.raises), el("p", {}, el("b", {}, "lowers "), r.lowers),
      el("h3", {}, "Whom it marks (AUROC; 0.5 is chance)"), bars(personas.map((p) => [p, r.auroc[p]]), 2),
      el("h3", {}, "Change in every fine-tune"), bars(Object.entries(r["fine-tunes"]), 3));
    detail.scrollIntoView({ behavior: "smooth" });
  }
  const columns = [
    { title: "latent", value: (r) => r.latent, cell: (r) => el("a", { href: `#${r.latent}` }, String(r.latent)), number: true },
    { title: "name", value: (r) => r.name },
    { title: "rise", value: (r) => r.rise, cell: (r) => number(r.rise, 3), number: true },
    { title: "active (%)", value: (r) => r.fires, cell: (r) => number(r.fires, 2), number: true },
    { title: "AUROC", value: (r) => r.auroc[keep.persona], cell: (r) => number(r.auroc[keep.persona], 2), number: true },
    { title: "raises", value: (r) => r.raises },
  ];
  const list = table(columns, "latents"), where = el("div");
  const show = () => {
    const some = LATENTS.filter((r) => `${named(r)} ${r.raises}`.toLowerCase().includes(keep.text));
    where.replaceChildren(plot(some));
    list.show(some);
  };
  home.append(el("form", { onsubmit: (e) => e.preventDefault() },
    choice("persona", personas, (v) => { keep.persona = v; show(); }, keep.persona), search("search names and tokens", (v) => { keep.text = v; show(); })), where, detail, list);
  window.addEventListener("hashchange", open);
  show();
  open();
}
