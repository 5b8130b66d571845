// Formulas, on the first page and on those that are loaded without a reload
const draw = () => renderMathInElement(document.body, {throwOnError: false,
  delimiters: [{left: "\\[", right: "\\]", display: true}, {left: "\\(", right: "\\)", display: false}]})
if (window.document$) document$.subscribe(draw)
else document.addEventListener("DOMContentLoaded", draw)
