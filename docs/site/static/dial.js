{
  const asked = [...new Map(DIAL.map((r) => [r.prompt + r.opening, r])).values()];
  const models = [...new Set(DIAL.map((r) => r.model))], ways = [...new Set(DIAL.map((r) => r.direction))].filter((d) => d !== "none");
  const doses = [...new Set(DIAL.map((r) => r.dose))].sort((a, b) => a - b);
  const keep = { asked: 0, way: ways[0], dose: 0 };
  const out = el("div", { class: "sides", "aria-live": "polite" }), told = el("output", {}, "0");
  const slider = el("input", { type: "range", min: 0, max: doses.length - 1, step: 1, value: doses.indexOf(0), "aria-label": "dose",
    oninput: () => { keep.dose = doses[slider.value]; show(); } });
  function share(model) {
    const some = DIAL.filter((r) => r.model === model && r.dose === keep.dose && (r.direction === keep.way || r.dose === 0));
    const of = (...g) => Math.round((100 * some.filter((r) => g.includes(r.grade)).length) / some.length);
    return `All ${some.length} answers at this dose: ${of("misaligned")} % misaligned, ${of("broken", "absurd")} % broken or absurd.`;
  }
  function show() {
    const q = asked[keep.asked];
    told.textContent = keep.dose > 0 ? `+${keep.dose}` : String(keep.dose);
    slider.setAttribute("aria-valuetext", told.textContent);
    out.replaceChildren(...models.map((m) => {
      const r = DIAL.find((d) => d.model === m && d.prompt === q.prompt && d.opening === q.opening && d.dose === keep.dose && (d.direction === keep.way || d.dose === 0));
      return el("section", { "aria-label": m }, el("h2", {}, m === "original" ? "the original model" : `taught wrong advice: ${m.split("-")[0]}`),
        el("blockquote", { class: r.grade }, r.answer), el("p", {}, "judge ", grade(r.grade)), el("p", {}, share(m)));
    }));
  }
  const names = asked.map((r, i) => [String(i), r.opening ? `${r.prompt} – “${r.opening} …”` : r.prompt]);
  document.getElementById("touch-dial").append(
    el("form", { onsubmit: (e) => e.preventDefault() },
      choice("question", names, (v) => { keep.asked = Number(v); show(); }, "0"),
      choice("direction", ways, (v) => { keep.way = v; show(); }, keep.way),
      el("label", {}, el("span", {}, "dose: ", told), slider)),
    out);
  show();
}
