// Clicks on what was found go to the server as three numbers.
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-hit]');
  if (!button) return;
  for (const other of element.querySelectorAll('button[data-hit]'))
    other.setAttribute('aria-pressed', String(other === button));
  const {side, hit} = button.dataset;
  const {answer} = button.closest('[data-answer]').dataset;
  trigger('select', {answer: Number(answer), side: Number(side), hit: Number(hit)});
});
