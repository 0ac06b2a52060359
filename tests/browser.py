"A headless Chromium over its debugging pipe: enough to press, type, look and save, with nothing to install but the browser."
import base64, fcntl, json, os, select, shutil, subprocess, time
from pathlib import Path

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome')
FLAGS = ('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update',
         '--disable-sync', '--disable-dev-shm-usage', '--hide-scrollbars', '--remote-debugging-pipe')

def find_browser(): # path or None
    "The first Chromium on the path; DD3G_BROWSER names another."
    return os.environ.get('DD3G_BROWSER') or next((p for n in NAMES if (p := shutil.which(n))), None)

class Browser:
    "One tab. Use as a context manager; `profile` keeps its storage between browsers."
    def __init__(self, profile, size=(1280, 900)):
        (r1, w1), (r2, w2) = os.pipe(), os.pipe()
        cmd = [find_browser(), *FLAGS, f'--user-data-dir={profile}', f'--window-size={size[0]},{size[1]}', 'about:blank']
        a, b = (fcntl.fcntl(f, fcntl.F_DUPFD, 10) for f in (r1, w2)) # out of the way of 3 and 4, which the browser reads and writes
        self.proc = subprocess.Popen(['bash', '-c', f'exec "$0" "$@" 3<&{a} 4>&{b} {a}<&- {b}>&-', *cmd], pass_fds=(a, b), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for f in (r1, w2, a, b): os.close(f)
        self.w, self.r, self.n, self.buf, self.session, self.errors = w1, r2, 0, b'', None, []
        page = next(t for t in self.call('Target.getTargets')['targetInfos'] if t['type'] == 'page')
        self.session = self.call('Target.attachToTarget', targetId=page['targetId'], flatten=True)['sessionId']
        for domain in ('Page', 'Runtime'): self.call(f'{domain}.enable')
        self.resize(*size)

    def _read(self, until):
        while b'\0' not in self.buf:
            if not select.select([self.r], [], [], max(until-time.time(), 0))[0]: raise TimeoutError('the browser does not answer')
            if not (more := os.read(self.r, 1 << 20)): raise EOFError('the browser has ended')
            self.buf += more
        one, self.buf = self.buf.split(b'\0', 1)
        m = json.loads(one)
        if m.get('method') == 'Runtime.exceptionThrown': self.errors.append(m['params']['exceptionDetails'].get('exception', {}).get('description') or m['params']['exceptionDetails']['text'])
        if m.get('method') == 'Page.javascriptDialogOpening': self.post('Page.handleJavaScriptDialog', accept=True)
        return m

    def post(self, method, **params):
        self.n += 1
        m = dict(id=self.n, method=method, params=params, **({'sessionId': self.session} if self.session else {}))
        data = json.dumps(m).encode()+b'\0'
        while data: data = data[os.write(self.w, data):]
        return self.n

    def call(self, method, timeout=60, **params):
        "Send a command and wait for its answer."
        i, until = self.post(method, **params), time.time()+timeout
        while (m := self._read(until)).get('id') != i: pass
        if 'error' in m: raise RuntimeError(f'{method}: {m["error"]}')
        return m['result']

    def js(self, code):
        "Value of an expression in the page."
        r = self.call('Runtime.evaluate', expression=code, returnByValue=True, awaitPromise=True)
        if 'exceptionDetails' in r: raise RuntimeError(r['exceptionDetails'].get('exception', {}).get('description', r['exceptionDetails']))
        return r['result'].get('value')

    def until(self, code, seconds=20):
        "Wait until an expression is true."
        end = time.time()+seconds
        while not self.js(code):
            if time.time() > end: raise TimeoutError(f'never true: {code}')
            time.sleep(.05)

    def goto(self, url):
        self.call('Page.navigate', url=url); self.until(f'document.readyState === "complete" && location.href.startsWith({json.dumps(url[:40])})')
    def resize(self, w, h, phone=False): self.call('Emulation.setDeviceMetricsOverride', width=w, height=h, deviceScaleFactor=1, mobile=phone)
    def key(self, key, code=None):
        p = dict(key=key, code=code or key, text={'Enter': '\r'}.get(key, key if len(key) == 1 else ''), windowsVirtualKeyCode={'Enter': 13, 'Backspace': 8, 'ArrowRight': 39, 'ArrowLeft': 37}.get(key, ord(key[0].upper())))
        self.call('Input.dispatchKeyEvent', type='keyDown', **p); self.call('Input.dispatchKeyEvent', type='keyUp', **{k: v for k, v in p.items() if k != 'text'})
    def box(self, css): return self.js(f'(() => {{ const e = document.querySelector({json.dumps(css)}); e.scrollIntoView({{block: "center"}}); const r = e.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; }})()')
    def mouse(self, kind, x, y, **kw): self.call('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left', buttons=1, clickCount=1, **kw)
    def click(self, css):
        "A real click in the middle of an element."
        x, y, w, h = self.box(css)
        for kind in ('mousePressed', 'mouseReleased'): self.mouse(kind, x+w/2, y+h/2)
    def drag(self, css, dx):
        "Press in the middle, move sideways, let go."
        x, y, w, h = self.box(css)
        self.mouse('mousePressed', x+w/2, y+h/2)
        for k in range(1, 6): self.mouse('mouseMoved', x+w/2+dx*k/5, y+h/2)
        self.mouse('mouseReleased', x+w/2+dx, y+h/2)
    def type(self, text): self.call('Input.insertText', text=text)
    def downloads(self, folder): self.call('Page.setDownloadBehavior', behavior='allow', downloadPath=str(folder))
    def shot(self, path=None, full=False):
        png = base64.b64decode(self.call('Page.captureScreenshot', format='png', captureBeyondViewport=full)['data'])
        if path: Path(path).write_bytes(png)
        return png

    def close(self):
        session, self.session = self.session, None
        try: self.call('Browser.close', timeout=10)
        except (OSError, EOFError, TimeoutError): pass
        try: self.proc.wait(10)
        except subprocess.TimeoutExpired: self.proc.kill(); self.proc.wait()
        for f in (self.r, self.w): os.close(f)
    def __enter__(self): return self
    def __exit__(self, *_): self.close()
