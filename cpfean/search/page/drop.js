// A photograph goes to the server as the text of a question: no file is kept there.
function send(file) {
  if (!file) return;
  const say = (text) => { element.querySelector('.drop-note').textContent = text; };
  if (file.size > Number(element.querySelector('.drop').dataset.most)) {
    say(`${file.name} is too large: at most 20 MB are taken.`);
    return;
  }
  say(`reading ${file.name} ...`);
  const reader = new FileReader();
  reader.onload = () => {
    say('');
    trigger('upload', {name: file.name, content: reader.result.split(',', 2)[1] ?? ''});
  };
  reader.onerror = () => say(`${file.name} cannot be read.`);
  reader.readAsDataURL(file);
}
element.addEventListener('change', (event) => {
  send(event.target.files[0]);
  event.target.value = '';  // the same one may be asked for again
});
for (const kind of ['dragover', 'dragleave', 'drop'])
  element.addEventListener(kind, (event) => {
    event.preventDefault();
    element.querySelector('.drop').classList.toggle('over', kind === 'dragover');
    if (kind === 'drop') send(event.dataTransfer.files[0]);
  });
