// A region and its line light up together, and a new pair comes into view.
for (const [kind, lit] of [['mouseover', true], ['mouseout', false]])
  element.addEventListener(kind, (event) => {
    const region = event.target.closest('[data-region]');
    if (!region) return;
    const pair = region.closest('.pair');
    for (const one of pair.querySelectorAll(`[data-region="${region.dataset.region}"]`))
      one.classList.toggle('lit', lit);
  });
watch('value', () => {
  const heading = element.querySelector('.asked, .problem');
  if (!heading) return;
  heading.focus({preventScroll: true});
  heading.scrollIntoView({behavior: 'smooth', block: 'start'});
});
