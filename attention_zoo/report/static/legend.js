// One legend for all charts: point at a group, or switch it off, and all of them follow.
zoo.legend = (() => {
  const most = 40;
  let box;

  function draw() {
    const {off} = zoo.state.get(),
      groups = zoo.select.groups();
    const buttons = groups.slice(0, most).map(group =>
      zoo.button(
        '',
        () => {
          const now = zoo.state.get().off;
          zoo.state.change({
            off: now.includes(group.name) ? now.filter(name => name !== group.name) : [...now, group.name],
          });
        },
        {'aria-pressed': String(!off.includes(group.name)), data: {group: group.name}},
      ),
    );
    buttons.forEach((button, number) => {
      const group = groups[number];
      button.append(zoo.swatch(group.style), group.name);
      const point = () => zoo.link.point({group: group.name, keys: []}),
        leave = () => zoo.link.point(null);
      for (const name of ['pointerenter', 'focus']) button.addEventListener(name, point);
      for (const name of ['pointerleave', 'blur']) button.addEventListener(name, leave);
    });
    const held = box.contains(document.activeElement) && document.activeElement.dataset.group;
    box.replaceChildren(
      ...buttons,
      groups.length > most ? zoo.el('span', {class: 'note'}, `and ${groups.length - most} more groups`) : '',
    );
    if (held) box.querySelector(`[data-group="${CSS.escape(held)}"]`)?.focus();
    mark(zoo.link.now());
  }

  function mark(what) {
    for (const button of box.querySelectorAll('button'))
      button.classList.toggle('linked', button.dataset.group === what?.group);
  }

  function start(node) {
    box = node;
    zoo.link.listen(mark);
    draw();
  }

  return {start, draw};
})();
