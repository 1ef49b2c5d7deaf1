"use strict";
// Filters of the gallery. Without scripts every answer is simply shown.
for (const section of document.querySelectorAll(".gallery-section")) {
  const controls = section.querySelector(".filters");
  controls.hidden = false;
  const apply = () => {
    const wanted = {};
    for (const input of controls.querySelectorAll("input:checked")) wanted[input.dataset.field] = input.value;
    let shown = 0;
    for (const group of section.querySelectorAll(".request")) {
      let any = false;
      for (const answer of group.querySelectorAll(".answer")) {
        const fits = (!wanted.arm || answer.dataset.arm === wanted.arm) &&
          (!wanted.mode || answer.dataset.mode === wanted.mode) &&
          (!wanted.result || answer.dataset.results.split(" ").includes(wanted.result));
        answer.hidden = !fits;
        any = any || fits;
        shown += fits ? 1 : 0;
      }
      group.hidden = !any;
    }
    controls.querySelector("output").textContent = shown + (shown === 1 ? " answer" : " answers");
  };
  controls.addEventListener("change", apply);
  apply();
}
