// Runs before the first paint, so that a chosen theme does not flash; hence no module.
(() => {
  const key = "trading-history-theme";
  let chosen = "auto";
  try {
    chosen = localStorage.getItem(key) ?? "auto";
  } catch {
    // Storage may be forbidden: then the choice lasts as long as the page.
  }
  const show = (theme) => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
  };
  show(chosen);
  document.addEventListener("DOMContentLoaded", () => {
    const select = document.getElementById("theme");
    select.value = ["auto", "light", "dark"].includes(chosen) ? chosen : "auto";
    select.addEventListener("change", () => {
      show(select.value);
      try {
        localStorage.setItem(key, select.value);
      } catch {
        // As above.
      }
      document.dispatchEvent(new Event("themechange"));
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
      document.dispatchEvent(new Event("themechange")));
  });
})();
