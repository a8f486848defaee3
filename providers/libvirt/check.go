// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
)

// The oldest libvirt that lab is tested with, as libvirt counts: 9.0.0.
const minVersion = 9_000_000

// The oldest QEMU that can run lab's machines, likewise: 7.2.0 brought the network cable
// (the stream netdev).
const minQEMU = 7_002_000

// capable returns an error if the daemon's QEMU is too old.
func (p *Provider) capable(ctx context.Context) error {
	is, err := answer(ctx, p.link, func(l *golibvirt.Libvirt) (uint64, error) { return l.ConnectGetVersion() })
	if err != nil {
		return err
	}
	return newEnough(is, p.cfg.URI)
}

func newEnough(qemu uint64, uri string) error {
	if qemu < minQEMU {
		return fmt.Errorf("%w: QEMU at %s is %s, and machines need %s or newer", providers.ErrIncapable, uri, version(qemu), version(minQEMU))
	}
	return nil
}

// installCure returns the command that installs libvirt on this host.
func installCure() string {
	return local.InstallCure(local.Packages{
		APT: "libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients qemu-system-x86 qemu-utils",
		DNF: "libvirt-daemon-driver-qemu libvirt-client qemu-system-x86-core qemu-img", Pacman: "libvirt qemu-base",
		Zypper: "libvirt-daemon-qemu libvirt-client qemu-x86 qemu-tools", APK: "libvirt-daemon libvirt-qemu libvirt-client qemu-system-x86_64 qemu-img",
		Else: "install libvirt 9.0 or newer, with its QEMU driver, and QEMU with your package manager",
	})
}

// Check looks at the daemon, its version and its emulator, acceleration and
// where machines' files lie. Like any other use, it starts a session's daemon, which
// ends by itself.
func (p *Provider) Check(ctx context.Context) ([]providers.Finding, error) {
	var found []providers.Finding
	if p.bad != nil {
		found = append(found, providers.Finding{Topic: "uri", Level: providers.LevelError, Detail: p.bad.Error(), Cure: "name another by uri in the Labfile, or " + URIVariable})
	} else {
		found = append(found, providers.Finding{Topic: "uri", Level: providers.LevelOK, Detail: p.addr.uri})
		found = append(found, p.checkDaemon(ctx)...)
	}
	if binary, err := p.binary(); err != nil {
		found = append(found, providers.Finding{Topic: "qemu", Level: providers.LevelError, Detail: "qemu-system-x86_64 not found", Cure: installCure()})
	} else {
		found = append(found, p.prober.Check(ctx, binary))
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("checking the host: %w", err)
	}
	return found, nil
}

// checkDaemon looks at what listens at the address.
func (p *Provider) checkDaemon(ctx context.Context) []providers.Finding {
	type versions struct{ lib, hypervisor uint64 }
	is, err := answer(ctx, p.link, func(l *golibvirt.Libvirt) (v versions, err error) {
		if v.lib, err = l.ConnectGetLibVersion(); err == nil {
			v.hypervisor, err = l.ConnectGetVersion()
		}
		return v, err
	})
	daemon := providers.Finding{Topic: "daemon", Level: providers.LevelOK}
	if err != nil {
		daemon.Level, daemon.Detail = providers.LevelError, err.Error()
		var absent *errAbsent
		var refused *errRefused
		switch {
		case errors.As(err, &absent) && errors.Is(err, os.ErrPermission):
			daemon.Detail, daemon.Cure = fmt.Sprintf("%s is not for this user: %v", absent.where, absent.err), absent.cure
		case errors.As(err, &absent):
			daemon.Detail, daemon.Cure = fmt.Sprintf("nothing listens at %s: %v", absent.where, absent.err), absent.cure
		case errors.As(err, &refused):
			daemon.Cure = refused.cure
		}
		return []providers.Finding{daemon}
	}
	daemon.Detail = fmt.Sprintf("libvirt %s with QEMU %s, at %s", version(is.lib), version(is.hypervisor), p.link.where())
	if is.lib < minVersion {
		daemon.Level = providers.LevelWarning
		daemon.Detail += fmt.Sprintf("; lab is tested with %s and newer", version(minVersion))
		daemon.Cure = "install libvirt from a newer release of your distribution or its backports"
	}
	if err := newEnough(is.hypervisor, p.cfg.URI); err != nil {
		daemon.Level, daemon.Detail = providers.LevelError, err.Error()
		daemon.Cure = "install QEMU there from a newer release of its distribution or its backports"
	}
	found := []providers.Finding{daemon, p.checkKVM(ctx), p.checkNetworks(ctx)}
	if p.client != "" {
		return found // files and confinement there are libvirt's business
	}
	if !p.addr.session {
		found = append(found, providers.Finding{
			Topic: "files", Level: providers.LevelOK,
			Detail: fmt.Sprintf("QEMU runs as user %d with what that user may do; libvirt changes the owner of no file", caller().UID),
		})
	}
	models, err := p.link.confinement(ctx)
	if err != nil {
		return append(found, providers.Finding{Topic: "confinement", Level: providers.LevelError, Detail: err.Error()})
	}
	for _, m := range models {
		found = append(found, providers.Finding{
			Topic: "confinement", Level: providers.LevelOK,
			Detail: fmt.Sprintf("libvirt knows %s; lab's machines run without, with their user's rights, as --provider qemu runs them", confining[m]),
		})
	}
	return found
}

// version renders a version as libvirt counts them.
func version(v uint64) string {
	return fmt.Sprintf("%d.%d.%d", v/1_000_000, v/1000%1000, v%1000)
}

// checkNetworks says what connects machines.
func (p *Provider) checkNetworks(ctx context.Context) providers.Finding {
	found := providers.Finding{Topic: "network", Level: providers.LevelOK}
	switch err := p.Networks(ctx); {
	case p.addr.session:
		found.Detail = "machines are plugged into the lab's own switch; no network of libvirt's is needed"
	case err != nil:
		found.Level, found.Detail = providers.LevelWarning, "libvirt can make no networks, so that machines have the lab's own switch only: "+err.Error()
		found.Cure = "install libvirt's network driver there (libvirt-daemon-driver-network, and dnsmasq)"
	case p.client == "" && !hasDNSMasq():
		found.Level, found.Detail = providers.LevelWarning, "dnsmasq was not found, without which libvirt makes no networks: machines have the lab's own switch only"
		found.Cure = "install dnsmasq (dnsmasq-base on Debian and Ubuntu)"
	default:
		found.Detail = "machines are in a network of libvirt's that each lab gets, and plugged into the lab's own switch"
	}
	return found
}

// hasDNSMasq looks for what serves addresses in libvirt's networks, also where only root's
// programs are.
func hasDNSMasq() bool {
	for _, path := range []string{"dnsmasq", "/usr/sbin/dnsmasq", "/usr/local/sbin/dnsmasq"} {
		if _, err := exec.LookPath(path); err == nil {
			return true
		}
	}
	return false
}

// offers returns nil if the daemon would run a domain of that type, or what it says.
func (p *Provider) offers(ctx context.Context, kind string) error {
	return p.link.ask(ctx, func(l *golibvirt.Libvirt) error {
		_, err := l.ConnectGetDomainCapabilities(nil, golibvirt.OptString{"x86_64"}, golibvirt.OptString{"q35"}, golibvirt.OptString{kind}, 0)
		return err
	})
}

// checkKVM asks what the daemon thinks of KVM. What lab uses is decided by running
// guest code, not by that.
func (p *Provider) checkKVM(ctx context.Context) providers.Finding {
	f := providers.Finding{Topic: "emulator", Level: providers.LevelOK, Detail: "libvirt offers KVM and emulation"}
	switch kvm, emulated := p.offers(ctx, "kvm"), p.offers(ctx, "qemu"); {
	case emulated != nil:
		f.Level, f.Detail, f.Cure = providers.LevelError, "libvirt cannot run machines of the type q35: "+emulated.Error(), installCure()
	case kvm != nil:
		f.Detail = "libvirt offers emulation only"
	}
	return f
}
