"use strict";
const root = document.documentElement;

// Language and theme.
document.getElementById("language").addEventListener("click", () => {
  root.dataset.lang = root.dataset.lang === "en" ? "zh" : "en";
  root.lang = root.dataset.lang === "en" ? "en" : "zh-CN";
});
document.getElementById("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
document.getElementById("print").addEventListener("click", () => print());

// The slider of each image, and which layers lie on its left and right.
for (const slider of document.querySelectorAll("input[type=range]")) {
  const move = () => slider.closest("figure").querySelector(".stack").style.setProperty("--x", slider.value + "%");
  slider.addEventListener("input", move);
  move();
}
function showLayers() {
  for (const side of ["left", "right"]) {
    const chosen = document.querySelector(`input[name=${side}]:checked`);
    for (const layer of document.querySelectorAll(".layer")) {
      layer.classList.toggle(side, layer.dataset.layer === chosen.value);
    }
  }
}
for (const choice of document.querySelectorAll(".choice input")) {
  choice.addEventListener("change", showLayers);
}
if (document.querySelector(".choice")) showLayers();

// Commands to copy; where the browser does not allow it, the command is selected.
for (const button of document.querySelectorAll("button.copy")) {
  button.addEventListener("click", async () => {
    const command = button.previousElementSibling;
    try {
      await navigator.clipboard.writeText(command.textContent);
      button.dataset.done = "yes";
      button.replaceChildren(...document.getElementById("copied").content.cloneNode(true).childNodes);
    } catch {
      getSelection().selectAllChildren(command);
    }
  });
}
