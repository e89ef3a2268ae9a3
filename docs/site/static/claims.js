{
  const keep = { part: "", holds: "", text: "" };
  const digits = (r) => (Math.abs(r.measured) < 1.5 && r.target < 1.5 ? 2 : 1);
  const columns = [
    { title: "holds", value: (r) => r.holds, cell: (r) => el("a", { href: r.page, title: `made in ${r.page}` }, r.holds) },
    { title: "the paper", value: (r) => r.paper },
    { title: "measured here", value: (r) => r.claim || r.id, cell: (r) => el("span", { title: r.id }, r.claim || r.id) },
    { title: "target", value: (r) => r.target, cell: (r) => `${r.op === ">=" ? "≥" : "≤"} ${r.target} ${r.unit}`, number: true },
    { title: "value", value: (r) => r.measured, cell: (r) => number(r.measured, digits(r)), number: true },
    { title: "95 % interval", value: (r) => r.low, cell: (r) => `${number(r.low, digits(r))} to ${number(r.high, digits(r))}`, number: true },
    { title: "part", value: (r) => r.part },
  ];
  const rows = table(columns, "claims"), count = el("p", { role: "status" });
  const show = () => {
    const some = CLAIMS.filter((r) => (!keep.part || r.part === keep.part) && (!keep.holds || r.holds === keep.holds) &&
      `${r.id} ${r.paper} ${r.claim}`.toLowerCase().includes(keep.text));
    const of = (h) => some.filter((r) => r.holds === h).length;
    count.textContent = `${some.length} claims: ${of("yes")} yes, ${of("unclear")} unclear, ${of("no")} no.`;
    rows.show(some);
  };
  const set = (key) => (value) => { keep[key] = value; show(); };
  keep.part = "I";
  document.getElementById("touch-claims").append(
    el("form", { onsubmit: (e) => e.preventDefault() },
      choice("part", [["", "both"], ["I", "I: SmolLM2-135M"], ["II", "II: the known world"]], set("part"), "I"),
      choice("holds", [["", "any"], "yes", "unclear", "no"], set("holds"), ""),
      search("search", set("text"))),
    count, rows);
  show();
}
