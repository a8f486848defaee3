// SPDX-License-Identifier: Apache-2.0

// Package libvirt runs machines as domains of a libvirt daemon. What a generation is
// stands in its domain's metadata; its files lie in the generation's directory, as
// the QEMU provider's do. The daemon may be killed, hang or be restarted at any time:
// machines go on, and calls end in seconds.
package libvirt

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"
	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/dirs"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/accel"
	"github.com/labfile/lab/providers/local"
)

// Config is what a Provider is made with. Only Dirs is needed.
type Config struct {
	Dirs   dirs.Dirs
	URI    string              // empty for DefaultURI
	Accel  string              // as accel.Prober.Wanted
	Getenv func(string) string // nil for os.Getenv
	Log    *slog.Logger        // debug messages; nil drops them
}

// URIVariable is the environment variable that names the daemon; the program that
// makes the Provider reads it.
const URIVariable = "LAB_LIBVIRT_URI"

// Provider runs machines with libvirt. It keeps no state besides its connection.
type Provider struct {
	cfg        Config
	log        *slog.Logger
	addr       address
	client     string // prefix of home; empty if the daemon is of this host
	bad        error  // what is wrong with the URI; told by every method
	logs       string // where the daemon writes about its domains
	link       *link
	prober     *accel.Prober
	networking sync.Mutex // held while a lab's network is made

	family *family
}

// family are the providers of all daemons that this process talks to, so that it has
// one connection to each.
type family struct {
	mu  sync.Mutex
	all map[string]Daemon // by URI
}

// Daemon is the provider of the machines of one daemon.
type Daemon interface {
	providers.Provider
	providers.Addressed
	Close() // ends the connection
}

var (
	_ providers.Provider    = (*Provider)(nil)
	_ providers.Cabled      = (*Provider)(nil)
	_ providers.AgentDialer = (*Provider)(nil)
	_ providers.Freezer     = (*Provider)(nil)
	_ providers.DiskReader  = (*Provider)(nil)
	_ providers.LogTrimmer  = (*Provider)(nil)
	_ providers.Addressed   = (*Provider)(nil)

	_ providers.SpecChecker   = (*Provider)(nil)
	_ providers.MemoryCounter = (*Provider)(nil)
	_ providers.RoomCounter   = (*Provider)(nil)
)

// New returns the provider of the daemon that cfg names: a *Provider if it is one of this
// host, else a *Remote. It touches nothing.
func New(cfg Config) Daemon {
	f := &family{all: map[string]Daemon{}}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.add(cfg)
}

// add makes the provider of a daemon that the family does not have. The caller has f.mu.
func (f *family) add(cfg Config) Daemon {
	p := newAt(cfg)
	p.family = f
	var d Daemon = p
	if p.bad == nil && !p.addr.local() {
		d = newRemote(p)
	}
	f.all[p.URI()] = d
	return d
}

func newAt(cfg Config) *Provider {
	if cfg.URI == "" {
		cfg.URI = DefaultURI
	}
	if cfg.Getenv == nil {
		cfg.Getenv = os.Getenv
	}
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	p := &Provider{cfg: cfg, log: log, prober: &accel.Prober{Wanted: cfg.Accel, Cache: cfg.Dirs.Cache, Log: log}}
	p.addr, p.bad = parseURI(cfg.URI)
	p.logs = logDir(p.addr, cfg.Getenv)
	p.link = &link{addr: p.addr, env: cfg.Getenv, log: log, quiet: quietTime, hung: hungTime, rest: restTime}
	return p
}

// URI names the daemon.
func (p *Provider) URI() string { return p.cfg.URI }

// At returns the provider of another daemon.
func (p *Provider) At(uri string) (providers.Provider, error) {
	if _, err := parseURI(uri); err != nil {
		return nil, err
	}
	if uri == "" {
		uri = DefaultURI
	}
	p.family.mu.Lock()
	defer p.family.mu.Unlock()
	if other, ok := p.family.all[uri]; ok {
		return other, nil
	}
	cfg := p.cfg
	cfg.URI = uri
	return p.family.add(cfg), nil
}

// Name returns "libvirt".
func (p *Provider) Name() string { return "libvirt" }

// Close ends the connection to the daemon.
func (p *Provider) Close() { p.link.close() }

// enter is how every method about a generation begins.
func (p *Provider) enter(ctx context.Context, g lab.Generation) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := local.CheckGeneration(g); err != nil {
		return err
	}
	return p.bad
}

// dir is the generation's directory.
func (p *Provider) dir(g lab.Generation) string { return p.cfg.Dirs.Domain(g) }

// home is the directory as the daemon is told it: whose a generation is. Users of
// several hosts may meet at a daemon.
func (p *Provider) home(g lab.Generation) string { return p.client + p.dir(g) }

// hold takes the generation's lock, so that nobody else starts or destroys it, and finds its
// domain. ErrNotFound if it lacks either.
func (p *Provider) hold(ctx context.Context, g lab.Generation) (held *os.File, d domain, err error) {
	if err := p.enter(ctx, g); err != nil {
		return nil, d, err
	}
	held, err = local.Lock(ctx, filepath.Join(p.dir(g), local.FileLock))
	if local.Gone(err) {
		err = providers.ErrNotFound
	}
	if err != nil {
		return nil, d, err
	}
	d, ok, err := p.find(ctx, g)
	if err == nil && !ok {
		err = providers.ErrNotFound
	}
	if err != nil {
		held.Close()
		return nil, d, err
	}
	return held, d, nil
}

// domain is one of lab's domains, as the daemon knows it.
type domain struct {
	golibvirt.Domain
	owner
}

// find looks for the generation's domain; ok is false if there is none, or if what
// has its UUID is not lab's.
func (p *Provider) find(ctx context.Context, g lab.Generation) (d domain, ok bool, err error) {
	d, err = answer(ctx, p.link, func(l *golibvirt.Libvirt) (domain, error) {
		dom, err := l.DomainLookupByUUID(uuidOf(p.home(g)))
		if err != nil {
			return domain{}, err
		}
		return identify(l, dom)
	})
	if isNotFound(err) {
		return domain{}, false, nil
	}
	if err != nil {
		return domain{}, false, err
	}
	return d, d.generation() == g && d.Directory == p.home(g), nil
}

// metadataElement is VIR_DOMAIN_METADATA_ELEMENT.
const metadataElement = 2

// identify reads the domain's metadata: of the definition that the next start will
// have or, of a domain that was undefined while it runs, of this run.
func identify(l *golibvirt.Libvirt, dom golibvirt.Domain) (domain, error) {
	text, err := l.DomainGetMetadata(dom, metadataElement, golibvirt.OptString{namespace}, golibvirt.DomainAffectConfig)
	if isInvalid(err) {
		text, err = l.DomainGetMetadata(dom, metadataElement, golibvirt.OptString{namespace}, golibvirt.DomainAffectCurrent)
	}
	if err != nil {
		return domain{}, err
	}
	o, err := parseOwner(text)
	return domain{dom, o}, err
}

// state asks what the domain is doing. One that was undefined and has ended is off.
func (p *Provider) state(ctx context.Context, d domain) (s golibvirt.DomainState, reason int32, err error) {
	type state struct{ number, why int32 }
	is, err := answer(ctx, p.link, func(l *golibvirt.Libvirt) (s state, err error) {
		s.number, s.why, err = l.DomainGetState(d.Domain, 0)
		return s, err
	})
	if isNotFound(err) {
		return golibvirt.DomainShutoff, 0, nil
	}
	return golibvirt.DomainState(is.number), is.why, err
}

// lives reports whether the machine of a domain in that state runs or can go on. Of one
// on another host whose guest panicked there is a QEMU left, for its state to be seen.
func (p *Provider) lives(s golibvirt.DomainState) bool {
	switch s {
	case golibvirt.DomainShutoff, golibvirt.DomainNostate:
		return false
	case golibvirt.DomainCrashed:
		return p.client == ""
	}
	return true
}

// Create makes the generation's directory and, last, defines its domain.
func (p *Provider) Create(ctx context.Context, spec providers.Spec) error {
	if err := p.create(ctx, spec); err != nil {
		return fmt.Errorf("creating machine %q: %w", spec.Generation, err)
	}
	return nil
}

func (p *Provider) create(ctx context.Context, spec providers.Spec) error {
	if err := p.enter(ctx, spec.Generation); err != nil {
		return err
	}
	if err := p.CheckSpec(ctx, spec); err != nil {
		return err
	}
	g := spec.Generation
	dir := p.dir(g)
	defined := func() (bool, error) {
		_, ok, err := p.find(ctx, g)
		return ok && exists(dir), err
	}
	return local.Make(ctx, dir, spec, defined, func(def local.Definition) error {
		_, err := p.define(ctx, domainName(g), dir, def)
		return err
	})
}

// define gives the domain called name the definition that its next start will have.
func (p *Provider) define(ctx context.Context, name, dir string, def local.Definition) (golibvirt.Domain, error) {
	var dom golibvirt.Domain
	if err := p.claim(dir); err != nil { // also of what an older lab made
		return dom, err
	}
	own, err := local.Overlays(dir)
	if err != nil {
		return dom, err
	}
	g := def.Generation()
	var r local.Run
	if _, err := local.ReadJSON(filepath.Join(dir, local.FileRun), &r); err != nil {
		return dom, err
	}
	d := Domain{
		Name: name, UUID: uuidOf(dir), Directory: dir, Def: def, KVM: r.Accel == accel.KVM, Files: filesIn(dir, &def, own),
		NIC: p.socket(g, socketNIC), Agent: p.socket(g, socketAgent),
	}
	if d.Emulator, err = p.binary(); err != nil {
		return dom, err
	}
	if d.Unconfined, err = p.link.confinement(ctx); err != nil {
		return dom, err
	}
	if !p.addr.session {
		d.RunAs = caller()
	}
	return p.defineDomain(ctx, d)
}

// defineDomain gives the domain the definition that its next start will have.
func (p *Provider) defineDomain(ctx context.Context, d Domain) (golibvirt.Domain, error) {
	if kind := d.Def.Network; kind != lab.NetworkSwitch {
		d.Network = p.networkOf(d.Def.Lab, kind, 0).Name
	}
	text, err := d.XML()
	if err != nil {
		return golibvirt.Domain{}, err
	}
	// Defining the same twice does no harm.
	dom, err := answer(ctx, p.link, func(l *golibvirt.Libvirt) (golibvirt.Domain, error) { return l.DomainDefineXMLFlags(text, 0) })
	if c, ok := code(err); ok && (c == golibvirt.ErrOperationFailed || c == golibvirt.ErrDomExist) {
		err = fmt.Errorf("libvirt does not take its definition: %w (a domain of that name or UUID that lab did not make is left alone; rename it, or the lab)", err)
	}
	return dom, err
}

// The kinds of sockets, as dirs.Socket names them.
const (
	socketNIC   = "nic"
	socketAgent = "agt"
)

func (p *Provider) socket(g lab.Generation, kind string) string { return p.cfg.Dirs.Socket(g, kind) }

// removeSockets removes what a QEMU that was killed left behind.
func (p *Provider) removeSockets(g lab.Generation) {
	for _, kind := range []string{socketNIC, socketAgent} {
		os.Remove(p.socket(g, kind))
	}
}

// socketsGone says that the sockets of a machine that runs since then are gone; empty if
// one is there, or may yet come: libvirt makes the agent's before QEMU starts, and QEMU
// the cable's when it gets to it.
func (p *Provider) socketsGone(def local.Definition, since time.Time) string {
	var paths []string
	if def.Agent {
		paths = append(paths, p.socket(def.Generation(), socketAgent))
	}
	if def.MAC != "" {
		paths = append(paths, p.socket(def.Generation(), socketNIC))
	}
	if len(paths) == 0 || !def.Agent && time.Since(since) < local.CableTime {
		return ""
	}
	return local.SocketsGone(paths)
}

// Destroy ends the domain, undefines it, moves the directory out of the way and then
// removes it: interrupted anywhere, it leaves what List shows and the next Destroy
// removes.
func (p *Provider) Destroy(ctx context.Context, g lab.Generation) error {
	return p.destroy(ctx, g, func(context.Context, lab.Generation) error {
		p.removeSockets(g)
		p.removeLog(domainName(g)) // also of a domain that was undefined, or is called otherwise now
		return nil
	})
}

// destroy removes a generation; own removes what it has besides its domain and its
// directory.
func (p *Provider) destroy(ctx context.Context, g lab.Generation, own func(context.Context, lab.Generation) error) error {
	if err := p.remove(ctx, g, own); err != nil {
		return fmt.Errorf("destroying machine %q: %w", g, err)
	}
	return nil
}

func (p *Provider) remove(ctx context.Context, g lab.Generation, own func(context.Context, lab.Generation) error) error {
	if err := p.enter(ctx, g); err != nil {
		return err
	}
	dir := p.dir(g)
	if !p.claims(dir) {
		if _, ok, err := p.find(ctx, g); err != nil || !ok {
			return err
		}
	}
	held, err := local.Lock(ctx, filepath.Join(dir, local.FileLock))
	if err != nil && !local.Gone(err) {
		return err
	}
	if err == nil {
		defer held.Close()
	}
	found, err := p.undefine(ctx, g, dir)
	if err != nil {
		return err
	}
	if found || held != nil || len(local.TrashOf(dir)) > 0 {
		if err := own(ctx, g); err != nil {
			return err
		}
	}
	if held != nil {
		if err := local.Discard(dir); err != nil {
			return err
		}
	}
	return local.Sweep(dir, p.cfg.Dirs.Labs(), p.cfg.Dirs.RunLab(g.Lab))
}

// everything is what goes with a domain's definition.
const everything = golibvirt.DomainUndefineManagedSave | golibvirt.DomainUndefineSnapshotsMetadata |
	golibvirt.DomainUndefineCheckpointsMetadata | golibvirt.DomainUndefineNvram

// undefine ends the domain and makes the daemon forget it.
func (p *Provider) undefine(ctx context.Context, g lab.Generation, dir string) (found bool, err error) {
	d, ok, err := p.find(ctx, g)
	if err != nil || !ok {
		return false, err
	}
	p.note(local.Intend(dir, "destroyed"))
	if err := p.kill(ctx, d); err != nil {
		return true, err
	}
	err = p.link.do(ctx, func(l *golibvirt.Libvirt) error { return l.DomainUndefineFlags(d.Domain, everything) })
	// One that was transient is gone with its end.
	if err != nil && !isNotFound(err) && !isInvalid(err) {
		return true, err
	}
	p.removeLog(d.Name)
	return true, nil
}

// Reach connects with the daemon.
func (p *Provider) Reach(ctx context.Context) error {
	if p.bad != nil {
		return p.bad
	}
	if _, err := p.link.connect(ctx, true); err != nil {
		return err
	}
	return p.capable(ctx)
}

// kill ends the domain by force. It returns once that is so. libvirt gives a QEMU ten
// seconds to end in good order; one whose process is stopped cannot use them.
func (p *Provider) kill(ctx context.Context, d domain) error {
	if pid := findQEMU(d.Directory); p.client == "" && pid != 0 && local.Halted(pid) {
		// Looked for again, now that it is held: the pid may be another's by now.
		if proc, err := local.OpenProcess(pid); err == nil {
			if findQEMU(d.Directory) != pid {
				p.log.Debug("a stopped QEMU ended by itself", "pid", pid)
			} else if err := proc.Signal(unix.SIGKILL); err != nil { // it may be another user's
				p.log.Debug("killing a stopped QEMU", "pid", pid, "error", err)
			}
			proc.Close()
		}
	}
	err := p.link.do(ctx, func(l *golibvirt.Libvirt) error { return l.DomainDestroyFlags(d.Domain, 0) })
	if isNotFound(err) || isInvalid(err) { // it does not run
		return nil
	}
	return err
}

// note drops the error of a record that could not be made: the directory may be gone.
func (p *Provider) note(err error) {
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		p.log.Debug("recording an exit", "error", err)
	}
}

// cleanupTime bounds what is undone after its context ended.
const cleanupTime = 15 * time.Second
