"use strict";
document.documentElement.classList.add("scripted");
for (const viewer of document.querySelectorAll(".viewer")) {
  const frames = [...viewer.parentElement.querySelectorAll(".strip figure")];
  const [image, now, far, slider] = ["img", ".now", ".distance", "input"].map((what) => viewer.querySelector(what));
  const show = (number) => {
    const shown = frames[number].querySelector("img");
    const text = frames[number].querySelector(".when").textContent;
    far.textContent = frames[number].querySelector(".distance").textContent;
    image.src = shown.src;
    image.alt = shown.alt;
    now.textContent = text;
    slider.value = number;
    slider.setAttribute("aria-valuetext", text);
    frames.forEach((frame, at) => frame.parentElement.setAttribute("aria-current", at === number));
  };
  frames.forEach((frame, number) => {
    const button = document.createElement("button");
    button.type = "button";
    frame.replaceWith(button);
    button.append(frame);
    button.addEventListener("click", () => show(number));
  });
  slider.max = frames.length - 1;
  slider.addEventListener("input", () => show(Number(slider.value)));
  show(frames.length - 1);
  viewer.hidden = false;
}
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, at) => row.cells[at].dataset.value ?? row.cells[at].textContent.trim();
  heads.forEach((head, at) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.textContent = head.textContent.trim();
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const rising = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const rows = [...body.rows].sort((one, other) => {
        const [a, b] = [value(one, at), value(other, at)];
        // What is missing stays last.
        if (a === "" || b === "") return (a === "") - (b === "");
        const order = isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
        return rising ? order : -order;
      });
      body.append(...rows);
    });
  });
}
