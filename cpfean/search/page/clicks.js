// Clicks on what was found go to the server as two numbers; regions light up with their lines.
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-hit]');
  if (!button) return;
  for (const other of element.querySelectorAll('button[data-hit]'))
    other.setAttribute('aria-pressed', String(other === button));
  trigger('select', {side: Number(button.dataset.side), hit: Number(button.dataset.hit)});
});
