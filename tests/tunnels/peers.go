package tunnels

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// Peers are started as their manuals say for what portal does: two ends that prove who they are, as
// far as they can, and what they protect by default. What is set beyond that lifts a limit which a
// load would otherwise meet.

func startSocat(ctx context.Context, d *Deployment) (string, error) {
	to := d.Target
	for _, end := range []struct {
		name string
		at   *Host
	}{{"exit", d.Far}, {"entry", d.Near}} {
		addr, err := d.accepts(end.at)
		if err != nil {
			return "", err
		}
		ip, port, _ := net.SplitHostPort(addr)
		// Its backlog is 5, less than a load opens at once.
		from := fmt.Sprintf("TCP4-LISTEN:%s,bind=%s,reuseaddr,backlog=1024,fork", port, ip)
		if err := d.Listens(ctx, addr, end.at, end.name, "socat", from, "TCP4:"+to); err != nil {
			return "", err
		}
		if end.at == d.Near {
			return addr, nil
		}
		if to, err = d.Link(ctx, addr); err != nil {
			return "", err
		}
	}
	return "", errors.New("no entry")
}

// startSSH starts an sshd of its own, with keys made for the run, and one ssh -L over one connection.
func startSSH(ctx context.Context, d *Deployment) (string, error) {
	sshd, err := programPath("sshd")
	if err != nil {
		return "", err
	}
	me, err := user.Current()
	if err != nil {
		return "", err
	}
	if os.Geteuid() == 0 {
		// sshd's privilege separation directory: its service makes it, and we do not run that.
		if err := os.Mkdir("/run/sshd", 0o755); err == nil {
			d.cleanups = append(d.cleanups, func() error { return os.Remove("/run/sshd") })
		} else if !errors.Is(err, os.ErrExist) {
			return "", err
		}
	}
	in := func(name string) string { return d.Dir + "/" + name }
	for _, key := range []string{"host", "user"} {
		if out, err := exec.CommandContext(ctx, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", in(key)).CombinedOutput(); err != nil {
			return "", fmt.Errorf("ssh-keygen: %w: %s", err, out)
		}
	}
	hostKey, err := os.ReadFile(in("host.pub"))
	if err != nil {
		return "", err
	}
	daemon, err := d.Far.Addr()
	if err != nil {
		return "", err
	}
	ip, port, _ := net.SplitHostPort(daemon)
	config, err := d.File("sshd_config", fmt.Sprintf(`ListenAddress %s
Port %s
HostKey %s
AuthorizedKeysFile %s
StrictModes no
UsePAM no
PidFile none
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
`, ip, port, in("host"), in("user.pub")))
	if err != nil {
		return "", err
	}
	server, err := d.Run(d.Far, "sshd", sshd, "-D", "-e", "-f", config)
	if err != nil {
		return "", err
	}
	if _, err := Line(ctx, server, `^Server (listening) on `); err != nil {
		return "", err
	}
	if daemon, err = d.Link(ctx, daemon); err != nil {
		return "", err
	}
	ip, port, _ = net.SplitHostPort(daemon)
	known, err := d.File("known_hosts", fmt.Sprintf("[%s]:%s %s", ip, port, hostKey))
	if err != nil {
		return "", err
	}
	listen, err := d.accepts(d.Near)
	if err != nil {
		return "", err
	}
	// LocalCommand runs once the forwarding listens: the line to wait for.
	client, err := d.Run(d.Near, "ssh", "ssh", "-F", "none", "-N", "-i", in("user"), "-p", port,
		"-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-o", "ExitOnForwardFailure=yes",
		"-o", "StrictHostKeyChecking=yes", "-o", "UserKnownHostsFile="+known,
		"-o", "PermitLocalCommand=yes", "-o", "LocalCommand=echo forwarding >&2",
		"-L", listen+":"+d.Target, me.Username+"@"+ip)
	if err != nil {
		return "", err
	}
	_, err = Line(ctx, client, `^(forwarding)$`)
	return listen, err
}

func startStunnel(ctx context.Context, d *Deployment) (string, error) {
	files, err := d.certificates()
	if err != nil {
		return "", err
	}
	to := d.Target
	for _, end := range []struct {
		name   string
		at     *Host
		client string
	}{{"server", d.Far, "no"}, {"client", d.Near, "yes"}} {
		addr, err := d.accepts(end.at)
		if err != nil {
			return "", err
		}
		// Warnings and worse on stderr; a line for each connection is not what is measured.
		config, err := d.File(end.name+".conf", fmt.Sprintf(`foreground = yes
syslog = no
debug = warning
pid =
[bench]
client = %s
accept = %s
connect = %s
cert = %s
key = %s
CAfile = %s
verifyChain = yes
`, end.client, addr, to, files[end.name+".pem"], files[end.name+".key"], files["ca.pem"]))
		if err != nil {
			return "", err
		}
		if err := d.Listens(ctx, addr, end.at, end.name, "stunnel", config); err != nil {
			return "", err
		}
		if end.at == d.Near {
			return addr, nil
		}
		if to, err = d.Link(ctx, addr); err != nil {
			return "", err
		}
	}
	return "", errors.New("no client")
}

func startSpiped(ctx context.Context, d *Deployment) (string, error) {
	secret := make([]byte, 32)
	rand.Read(secret)
	key, err := d.File("key", string(secret))
	if err != nil {
		return "", err
	}
	to := d.Target
	for _, end := range []struct {
		name, does string
		at         *Host
	}{{"decrypting", "-d", d.Far}, {"encrypting", "-e", d.Near}} {
		addr, err := d.accepts(end.at)
		if err != nil {
			return "", err
		}
		// -n 0: no limit of connections, which is 100 else. -o: a handshake may take longer than 5 s
		// where many begin at once. -R: the target is an address.
		if err := d.Listens(ctx, addr, end.at, end.name, "spiped", "-F", end.does, "-s", bracketed(addr), "-t", bracketed(to), "-k", key, "-n", "0", "-o", "20", "-R"); err != nil {
			return "", err
		}
		if end.at == d.Near {
			return addr, nil
		}
		if to, err = d.Link(ctx, addr); err != nil {
			return "", err
		}
	}
	return "", errors.New("no encrypting end")
}

// bracketed is an address as spiped takes one that is no name.
func bracketed(addr string) string {
	ip, port, _ := net.SplitHostPort(addr)
	return "[" + ip + "]:" + port
}

func startGhostunnel(ctx context.Context, d *Deployment) (string, error) {
	files, err := d.certificates()
	if err != nil {
		return "", err
	}
	server, err := d.Far.Addr()
	if err != nil {
		return "", err
	}
	with := func(end string) []string {
		return []string{"--cert", files[end+".pem"], "--key", files[end+".key"], "--cacert", files["ca.pem"], "--quiet", "all", "--shutdown-timeout", "1s"}
	}
	if err := d.Listens(ctx, server, d.Far, "server", "ghostunnel", append([]string{"server", "--listen", server, "--target", d.Target,
		"--unsafe-target", "--allow-cn", "client"}, with("server")...)...); err != nil {
		return "", err
	}
	if server, err = d.Link(ctx, server); err != nil {
		return "", err
	}
	client, err := d.accepts(d.Near)
	if err != nil {
		return "", err
	}
	return client, d.Listens(ctx, client, d.Near, "client", "ghostunnel", append([]string{"client", "--listen", client, "--target", server,
		"--override-server-name", "server"}, with("client")...)...)
}

func startChisel(ctx context.Context, d *Deployment) (string, error) {
	server, err := d.Far.Addr()
	if err != nil {
		return "", err
	}
	users, err := d.File("users.json", `{"bench:`+rand.Text()+`": [""]}`)
	if err != nil {
		return "", err
	}
	b, err := os.ReadFile(users)
	if err != nil {
		return "", err
	}
	auth := strings.Split(string(b), `"`)[1]
	ip, port, _ := net.SplitHostPort(server)
	s, err := d.Run(d.Far, "server", "chisel", "server", "--host", ip, "--port", port, "--authfile", users)
	if err != nil {
		return "", err
	}
	fingerprint, err := Line(ctx, s, `Fingerprint (\S+)$`)
	if err != nil {
		return "", err
	}
	if _, err := Line(ctx, s, `(Listening) on `); err != nil {
		return "", err
	}
	if server, err = d.Link(ctx, server); err != nil {
		return "", err
	}
	listen, err := d.accepts(d.Near)
	if err != nil {
		return "", err
	}
	c, err := d.Run(d.Near, "client", "chisel", "client", "--auth", auth, "--fingerprint", fingerprint, "http://"+server, listen+":"+d.Target)
	if err != nil {
		return "", err
	}
	_, err = Line(ctx, c, `(Connected) `)
	return listen, err
}

func startFrp(ctx context.Context, d *Deployment) (string, error) {
	server, err := d.Far.Addr()
	if err != nil {
		return "", err
	}
	ip, port, _ := net.SplitHostPort(server)
	token, secret := rand.Text(), rand.Text()
	common := func(ip, port string) string {
		return fmt.Sprintf("serverAddr = %q\nserverPort = %s\nauth.token = %q\nloginFailExit = false\n", ip, port, token)
	}
	start := func(at *Host, name, program, config, pattern string) error {
		file, err := d.File(strings.ReplaceAll(name, " ", "-")+".toml", config)
		if err != nil {
			return err
		}
		p, err := d.Run(at, name, program, "-c", file)
		if err == nil && pattern != "" {
			_, err = Line(ctx, p, pattern)
		}
		return err
	}
	if err := start(d.Far, "frps", "frps", fmt.Sprintf("bindAddr = %q\nbindPort = %s\nauth.token = %q\n", ip, port, token), `frps (started) successfully`); err != nil {
		return "", err
	}
	targetIP, targetPort, _ := net.SplitHostPort(d.Target)
	if err := start(d.Far, "frpc", "frpc", common(ip, port)+fmt.Sprintf(`[[proxies]]
name = "bench"
type = "stcp"
secretKey = %q
localIP = %q
localPort = %s
transport.useEncryption = true
`, secret, targetIP, targetPort), `(start) proxy success`); err != nil {
		return "", err
	}
	if server, err = d.Link(ctx, server); err != nil {
		return "", err
	}
	ip, port, _ = net.SplitHostPort(server)
	listen, err := d.accepts(d.Near)
	if err != nil {
		return "", err
	}
	bindIP, bindPort, _ := net.SplitHostPort(listen)
	return listen, start(d.Near, "visiting frpc", "frpc", common(ip, port)+fmt.Sprintf(`[[visitors]]
name = "visitor"
type = "stcp"
serverName = "bench"
secretKey = %q
bindAddr = %q
bindPort = %s
transport.useEncryption = true
`, secret, bindIP, bindPort), `(start) visitor success`)
}

// startRathole has its public side, the server, next to the clients: its client dials it from where
// the target is.
func startRathole(ctx context.Context, d *Deployment) (string, error) {
	out, err := exec.CommandContext(ctx, "rathole", "--genkey").Output()
	if err != nil {
		return "", fmt.Errorf("rathole --genkey: %w", err)
	}
	keys := regexp.MustCompile(`(?m)^[A-Za-z0-9+/]{43}=$`).FindAllString(string(out), -1)
	if len(keys) != 2 {
		return "", fmt.Errorf("rathole --genkey printed %q", out)
	}
	control, err := d.Near.Addr()
	if err != nil {
		return "", err
	}
	listen, err := d.accepts(d.Near)
	if err != nil {
		return "", err
	}
	token := rand.Text()
	const noise = "[%s.transport]\ntype = \"noise\"\n[%[1]s.transport.noise]\npattern = \"Noise_NK_25519_ChaChaPoly_BLAKE2s\"\n%s = %q\n"
	server, err := d.File("server.toml", fmt.Sprintf("[server]\nbind_addr = %q\ndefault_token = %q\n", control, token)+
		fmt.Sprintf(noise, "server", "local_private_key", keys[0])+
		fmt.Sprintf("[server.services.bench]\nbind_addr = %q\n", listen))
	if err != nil {
		return "", err
	}
	if err := d.Listens(ctx, control, d.Near, "server", "rathole", server); err != nil {
		return "", err
	}
	if control, err = d.Link(ctx, control); err != nil {
		return "", err
	}
	client, err := d.File("client.toml", fmt.Sprintf("[client]\nremote_addr = %q\ndefault_token = %q\n", control, token)+
		fmt.Sprintf(noise, "client", "remote_public_key", keys[1])+
		fmt.Sprintf("[client.services.bench]\nlocal_addr = %q\n", d.Target))
	if err != nil {
		return "", err
	}
	_, err = d.Run(d.Far, "client", "rathole", client)
	return listen, err
}

// startOckam has a node at either end, without a project: no account is asked for. It follows Ockam's
// documentation, of version 0.150, and is untried.
func startOckam(ctx context.Context, d *Deployment) (string, error) {
	node := func(at *Host, name, addr, sections string) error {
		home := "OCKAM_HOME=" + filepath.Join(d.Dir, name)
		return d.Listens(ctx, addr, at, name, "env", home, "OCKAM_DISABLE_UPGRADE_CHECK=true", "NO_INPUT=true",
			"ockam", "node", "create", "--foreground", "--configuration", fmt.Sprintf("{name: %s, %s}", name, sections))
	}
	far, err := d.Far.Addr()
	if err != nil {
		return "", err
	}
	if err := node(d.Far, "outlet", far, fmt.Sprintf("tcp-listener-address: '%s', tcp-outlet: {bench: {from: outlet, to: '%s'}}", far, d.Target)); err != nil {
		return "", err
	}
	if far, err = d.Link(ctx, far); err != nil {
		return "", err
	}
	listen, err := d.accepts(d.Near)
	if err != nil {
		return "", err
	}
	ip, port, _ := net.SplitHostPort(far)
	return listen, node(d.Near, "inlet", listen, fmt.Sprintf("tcp-inlet: {bench: {from: '%s', to: '/ip4/%s/tcp/%s/secure/api/service/outlet'}}", listen, ip, port))
}

// certificates makes an authority and what it signs for a server and a client: a file each.
func (d *Deployment) certificates() (files map[string]string, err error) {
	files = map[string]string{}
	write := func(name, kind string, der []byte) {
		if err == nil {
			files[name], err = d.File(name, string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})))
		}
	}
	var authority *x509.Certificate
	var signer *ecdsa.PrivateKey
	for i, name := range []string{"ca", "server", "client"} {
		key, e := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if e != nil {
			return nil, e
		}
		c := &x509.Certificate{
			SerialNumber: big.NewInt(int64(i + 1)), Subject: pkix.Name{CommonName: name},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
			DNSNames: []string{name},
		}
		if authority == nil {
			c.IsCA, c.BasicConstraintsValid, c.KeyUsage, c.ExtKeyUsage = true, true, x509.KeyUsageCertSign, nil
			authority, signer = c, key
		}
		der, e := x509.CreateCertificate(rand.Reader, c, authority, &key.PublicKey, signer)
		if e != nil {
			return nil, e
		}
		private, e := x509.MarshalPKCS8PrivateKey(key)
		if e != nil {
			return nil, e
		}
		write(name+".pem", "CERTIFICATE", der)
		write(name+".key", "PRIVATE KEY", private)
	}
	return files, err
}

// authorityOf is the identifier of the authority that a home hosts.
func authorityOf(run func(home string, args ...string) (string, error), home string) (string, error) {
	out, err := run(home, "ticket", "create", "--name", "nobody", "-o", "json")
	if err != nil {
		return "", err
	}
	var ticket struct{ Authority string }
	if err := json.Unmarshal([]byte(out), &ticket); err != nil {
		return "", fmt.Errorf("a ticket as JSON: %w", err)
	}
	return ticket.Authority, nil
}
