"""The page's own style and script. Both are inlined, so that a report is one file that needs no network."""

STYLE = """
:root{color-scheme:light dark;--ink:#20242a;--muted:#5f6772;--line:#e2e5e9;--paper:#fefefe;--soft:#f4f6f8;
--warn:#8a5200;--warnbg:#fff6e6;--warnline:#f0d9ae;--link:#1d5fc4}
@media screen and (prefers-color-scheme:dark){:root{--ink:#e6e8eb;--muted:#98a1ad;--line:#2b3038;--paper:#171a1f;
--soft:#1f242b;--warn:#f2c078;--warnbg:#2a2317;--warnline:#4d3f22;--link:#8ab8ff}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,'Segoe UI',Roboto,
'Helvetica Neue',Arial,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1320px;margin:0 auto;padding:32px 24px 72px}
h1{font-size:1.9rem;line-height:1.2;letter-spacing:-.02em;margin:0 0 .4em;font-weight:650}
h2{font-size:1.25rem;letter-spacing:-.01em;margin:3rem 0 .35rem;font-weight:650;
padding-top:1.1rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:0 0 .15rem;font-weight:600}
p{margin:.35rem 0;max-width:92ch}
a{color:var(--link)}
.lead{margin:0;padding:0;list-style:none;font-size:1.04rem}
.lead li{max-width:92ch;margin:.4rem 0}
.note,figcaption p{color:var(--muted);font-size:.9rem}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin:1.1rem 0 0;font-size:.9rem}
nav a{text-decoration:none}nav a:hover{text-decoration:underline}
.warn{background:var(--warnbg);border:1px solid var(--warnline);border-left-width:4px;color:var(--ink);
border-radius:6px;padding:.6rem .95rem;margin:1.1rem 0 0}
.warn ul{margin:.2rem 0;padding-left:1.1rem}.warn b{color:var(--warn)}
.scroll{overflow-x:auto;margin:.7rem 0;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.875rem;white-space:nowrap}
th,td{padding:.42rem .6rem;text-align:right;border-bottom:1px solid var(--line)}
th{font-weight:600;vertical-align:bottom}
thead th{color:var(--muted);font-weight:500;font-size:.8125rem}
thead tr.groups th{border-bottom:0;white-space:normal;color:var(--ink);font-weight:600;text-align:left;padding-bottom:0}
.edge{border-left:1px solid var(--line)}
th:first-child,td:first-child,.text td,.text th{text-align:left}
tbody th{position:sticky;left:0;background:var(--paper)}
.text td{white-space:normal;min-width:4.5rem;max-width:44rem;overflow-wrap:break-word}
.text td,.text tbody th{vertical-align:top}
tbody tr:hover td,tbody tr:hover th{background:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:28px 32px;margin-top:1rem}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:24px 26px;margin-top:1rem}
figure{margin:0;min-width:0}
figcaption{margin-bottom:.2rem}
.plot{width:100%;height:390px}
.square{display:grid;grid-template-rows:subgrid;grid-row:span 4;row-gap:0}
.square .plot{height:auto;aspect-ratio:1}
.legend{display:flex;flex-wrap:wrap;gap:2px 4px;margin:.35rem 0 .1rem -6px}
.legend button{display:inline-flex;align-items:center;gap:6px;font:inherit;font-size:.8125rem;line-height:1.2;
color:var(--ink);background:none;border:0;border-radius:6px;padding:5px 6px;cursor:pointer}
.legend button:hover{background:var(--soft)}
.legend button:focus-visible{outline:2px solid var(--link)}
.legend button[aria-pressed=false]{color:var(--muted);text-decoration:line-through}
.legend button[aria-pressed=false] svg{opacity:.3}
.legend span{display:inline-flex;align-items:center;gap:6px;font-size:.8125rem;padding:5px 6px}
.legend svg{flex:none}
details{margin:.35rem 0;font-size:.875rem}
summary{cursor:pointer;color:var(--muted);font-size:.8125rem}
figcaption p{max-width:none}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.3rem 1.2rem;font-size:.9rem;margin:.6rem 0}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.86em;
background:var(--soft);padding:.08em .3em;border-radius:4px}
footer{margin-top:3.5rem;color:var(--muted);font-size:.8125rem;border-top:1px solid var(--line);padding-top:1rem}
@media (max-width:760px){main{padding:20px 16px 48px}h1{font-size:1.5rem}.charts{grid-template-columns:minmax(0,1fr)}
.plot{height:330px}.pictures{grid-template-columns:repeat(2,minmax(0,1fr));gap:20px 14px}
dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.5rem}th,td{padding:.38rem .55rem}
tbody th{max-width:46vw;white-space:normal;overflow-wrap:anywhere}}
@page{size:A4 landscape;margin:11mm}
@media print{html{font-size:11.5px}body{font-size:1rem}main{max-width:none;padding:0}nav,details{display:none}
h2{margin-top:1.6rem}h2,h3,figcaption{break-after:avoid}tr,dt,dd,.warn{break-inside:avoid}
.scroll{overflow:visible}table{width:100%;white-space:normal;font-size:.8rem}thead{display:table-header-group}
thead th{font-size:.76rem}th,td{padding:.25rem .35rem}th{overflow-wrap:anywhere}tbody th{position:static}
.text td{min-width:0;max-width:none;overflow-wrap:anywhere}
.charts,.pictures{display:block}dl{grid-template-columns:max-content 1fr;gap:.1rem 1rem}dd{margin:0}
figure{display:inline-block;vertical-align:top;width:48%;margin:0 1% 1.2rem 0;break-inside:avoid}
.pictures figure,.square{display:inline-block;width:31%}
.legend button,.legend span{padding:1px 5px}
.plot,.square .plot{height:auto;aspect-ratio:auto}
.plot .svg-container{width:100%!important;height:auto!important;aspect-ratio:var(--ratio,1.6)}
.plot .main-svg{width:100%!important;height:100%!important}}
"""

# Figures are written in the light theme's colours; DARK maps each to its partner. A legend button shows and hides the
# traces of its group. A chart is marked drawn once plotly has finished, so that tests can count. It scales with its
# box, since paper is narrower than the screen that it was drawn for; and paper is light, whatever the screen.
SCRIPT = """
(function () {
  const read = id => JSON.parse(document.getElementById(id).textContent);
  const figures = read('figures'), dark = read('dark');
  const theme = matchMedia('(prefers-color-scheme: dark)');
  const coarse = matchMedia('(pointer: coarse)').matches;
  const hidden = {};
  let paper = false;
  const isDark = () => theme.matches && !paper;
  function paint(text) {
    if (!isDark()) return text;
    return text.replace(/#[0-9a-f]{6}/g, color => dark[color] || color);
  }
  function scale(plot) {
    const {width, height} = plot._fullLayout;
    plot.style.setProperty('--ratio', `${width} / ${height}`);
    for (const svg of plot.querySelectorAll('.main-svg')) svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
  }
  function draw(plot) {
    const key = plot.dataset.figure;
    const spec = JSON.parse(paint(JSON.stringify(figures[key])));
    spec.layout.dragmode = coarse ? false : 'zoom';
    for (const trace of spec.data)
      if ((hidden[key] || new Set()).has(trace.legendgroup)) trace.visible = false;
    return Plotly.react(plot, spec.data, spec.layout, {responsive: true, displayModeBar: false})
      .then(() => {
        if (!plot.dataset.drawn) plot.on('plotly_afterplot', () => scale(plot));
        scale(plot);
        plot.dataset.drawn = 'yes';
      });
  }
  const plots = Array.from(document.querySelectorAll('.plot'));
  const all = () => Promise.all(plots.map(draw)).then(() => { document.body.dataset.drawn = plots.length; });
  document.addEventListener('click', event => {
    const button = event.target.closest('.legend button');
    if (!button) return;
    const key = button.dataset.figure, group = button.dataset.group;
    const off = hidden[key] = hidden[key] || new Set();
    const show = off.has(group);
    if (show) off.delete(group); else off.add(group);
    button.setAttribute('aria-pressed', String(show));
    draw(plots.find(plot => plot.dataset.figure === key));
  });
  function swatches() {
    for (const svg of document.querySelectorAll('.legend svg')) {
      const color = svg.dataset.color;
      svg.style.color = isDark() ? dark[color] || color : color;
    }
  }
  const repaint = () => { swatches(); all(); };
  theme.addEventListener('change', repaint);
  for (const [name, value] of [['beforeprint', true], ['afterprint', false]])
    window.addEventListener(name, () => { paper = value; if (theme.matches) repaint(); });
  swatches();
  all();
})();
"""
