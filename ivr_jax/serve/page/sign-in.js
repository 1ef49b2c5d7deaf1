// Sends the token once; the server answers with a cookie that no script can read.
const alert = document.getElementById("alert");
document.getElementById("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const body = JSON.stringify({ token: document.getElementById("token").value });
  const answer = await fetch("/sign-in", { method: "POST", headers: { "Content-Type": "application/json" }, body }).catch(() => null);
  if (answer && answer.ok) location.replace("/");
  else {
    alert.textContent = answer ? (await answer.json()).error.message : "The server does not answer.";
    alert.hidden = false;
  }
});
