// Names what the theme leaves without a name, and lets keys scroll what is wider than the page.
function label(root) {
  root.querySelectorAll("nav.md-code__nav").forEach((nav, k) => {
    if (!nav.ariaLabel) nav.ariaLabel = `Code block ${k + 1}, copy`;
  });
  root.querySelectorAll(".md-typeset__scrollwrap, pre > code").forEach((part, k) => {
    if (part.hasAttribute("tabindex")) return;
    part.tabIndex = 0;
    part.setAttribute("role", "region");
    part.ariaLabel = `${part.matches("code") ? "Code" : "Table"}, part ${k + 1} of the page`;
  });
}
const page = document.querySelector("[data-md-component=content]") ?? document.body;
new MutationObserver(() => label(page)).observe(page, { childList: true, subtree: true });
label(page);
