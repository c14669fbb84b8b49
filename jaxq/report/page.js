// Tooltips: whatever has data-tip shows it beside the pointer.
const tip = document.getElementById("tip");
document.addEventListener("pointermove", (event) => {
  const target = event.target.closest("[data-tip]");
  if (!target) { tip.style.display = "none"; return; }
  tip.textContent = target.dataset.tip;
  tip.style.display = "block";
  const room = 14;
  const left = event.clientX + room + tip.offsetWidth > innerWidth
    ? event.clientX - room - tip.offsetWidth : event.clientX + room;
  const top = event.clientY + room + tip.offsetHeight > innerHeight
    ? event.clientY - room - tip.offsetHeight : event.clientY + room;
  tip.style.left = `${Math.max(left, 4)}px`;
  tip.style.top = `${Math.max(top, 4)}px`;
});
