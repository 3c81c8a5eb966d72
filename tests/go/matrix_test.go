// Package matrix calls a real server as programs in Go do: every protocol, encoding and version of HTTP, in clear text and
// with TLS. What a connection can carry succeeds and fails as the server means it; what it cannot leaves nothing behind.
package matrix

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/bufbuild/protocompile"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"
)

const (
	inside    = "NAGAYA_TEST_IN_OWN_NETWORK"
	unknownID = "0190a8f0-0000-7000-8000-000000000000"
	control   = "tenki.sandbox.v1.SandboxService"
	dataPlane = "tenki.sandbox.v1.SandboxSessionDataPlaneService"
)

// Servers share the names of the packet filter's tables, so the tests run in a network of their own.
func TestMain(m *testing.M) {
	if os.Getenv(inside) == "" {
		again := exec.Command(os.Args[0], os.Args[1:]...)
		again.Env = append(os.Environ(), inside+"=1")
		again.Stdout, again.Stderr = os.Stdout, os.Stderr
		again.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNET}
		if err := again.Run(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if err := exec.Command("ip", "link", "set", "lo", "up").Run(); err != nil {
		fmt.Fprintln(os.Stderr, "ip link set lo up:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// server is a real one on a free port, removed with everything it made.
type server struct {
	url, key string
	roots    *x509.CertPool
	methods  map[string]protoreflect.MethodDescriptor
}

func start(t *testing.T, secure bool) *server {
	t.Helper()
	binary := os.Getenv("NAGAYA_BIN")
	if binary == "" {
		binary = "../../target/debug/nagaya"
	}
	directory, err := os.MkdirTemp("", "nagaya-test-")
	must(t, err)
	started := &server{methods: methods(t)}
	configuration := "[pools]\nslots_ready = 2\nisolated_slots_ready = 1\n"
	if secure {
		started.roots = x509.NewCertPool()
		configuration = certificate(t, directory, started.roots) + configuration
	}
	must(t, os.WriteFile(filepath.Join(directory, "test.toml"), []byte(configuration), 0o600))
	process := exec.Command(binary, "serve", "--listen", "127.0.0.1:0", "--data-dir", directory,
		"--config", filepath.Join(directory, "test.toml"))
	log, err := os.Create(filepath.Join(directory, "log"))
	must(t, err)
	process.Stderr = log
	output, err := process.StdoutPipe()
	must(t, err)
	must(t, process.Start())
	t.Cleanup(func() {
		_ = process.Process.Signal(syscall.SIGTERM)
		_ = process.Wait()
		if text, err := exec.Command(binary, "purge", "--data-dir", directory).CombinedOutput(); err != nil {
			t.Errorf("purge: %v: %s", err, text)
		}
		_ = os.RemoveAll(directory)
	})
	lines := bufio.NewScanner(output)
	for started.url == "" && lines.Scan() {
		if url, found := strings.CutPrefix(lines.Text(), "nagaya ready on "); found {
			started.url = url
		}
	}
	go func() { _, _ = io.Copy(io.Discard, output) }()
	if started.url == "" {
		text, _ := os.ReadFile(log.Name())
		t.Fatalf("the server did not become ready:\n%s", text)
	}
	key, err := os.ReadFile(filepath.Join(directory, "api-key"))
	must(t, err)
	started.key = strings.TrimSpace(string(key))
	return started
}

// certificate makes a key pair for 127.0.0.1 that the roots know, and tells the configuration that uses it.
func certificate(t *testing.T, directory string, roots *x509.CertPool) string {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	must(t, err)
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	public := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	roots.AppendCertsFromPEM(public)
	certificateFile, keyFile := filepath.Join(directory, "cert.pem"), filepath.Join(directory, "key.pem")
	must(t, os.WriteFile(certificateFile, public, 0o600))
	must(t, os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}), 0o600))
	return fmt.Sprintf("tls = { certificate_file = %q, key_file = %q }\n", certificateFile, keyFile)
}

// methods of the contract by their names, read from the files that the server's code is made of.
func methods(t *testing.T) map[string]protoreflect.MethodDescriptor {
	compiler := protocompile.Compiler{Resolver: protocompile.WithStandardImports(
		&protocompile.SourceResolver{ImportPaths: []string{"../../proto"}})}
	files, err := compiler.Compile(context.Background(), "tenki/sandbox/v1/sandbox.proto")
	must(t, err)
	found := map[string]protoreflect.MethodDescriptor{}
	services := files[0].Services()
	for i := range services.Len() {
		methods := services.Get(i).Methods()
		for j := range methods.Len() {
			found[string(services.Get(i).FullName())+"/"+string(methods.Get(j).Name())] = methods.Get(j)
		}
	}
	return found
}

// way is how calls travel.
type way struct {
	http2    bool
	options  []connect.ClientOption
	protocol string
}

func ways() map[string]way {
	all := map[string]way{}
	for protocol, choice := range map[string][]connect.ClientOption{
		"Connect": nil, "gRPC": {connect.WithGRPC()}, "gRPC-Web": {connect.WithGRPCWeb()},
	} {
		for encoding, codec := range map[string][]connect.ClientOption{"binary": nil, "JSON": {connect.WithProtoJSON()}} {
			for version, http2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2": true} {
				options := append(append([]connect.ClientOption{}, choice...), codec...)
				all[protocol+" "+encoding+" "+version] = way{http2, options, protocol}
			}
		}
	}
	return all
}

func (s *server) client(w way) *http.Client {
	transport := &http.Transport{Protocols: new(http.Protocols)}
	if s.roots != nil {
		transport.TLSClientConfig = &tls.Config{RootCAs: s.roots}
		transport.Protocols.SetHTTP2(w.http2)
	} else {
		transport.Protocols.SetUnencryptedHTTP2(w.http2)
	}
	transport.Protocols.SetHTTP1(!w.http2)
	return &http.Client{Transport: transport, Timeout: time.Minute}
}

type message = dynamicpb.Message

func (s *server) rpc(w way, client *http.Client, name string) *connect.Client[message, message] {
	options := append([]connect.ClientOption{
		connect.WithSchema(s.methods[name]),
		connect.WithResponseInitializer(func(spec connect.Spec, response any) error {
			*response.(*message) = *dynamicpb.NewMessage(spec.Schema.(protoreflect.MethodDescriptor).Output())
			return nil
		}),
	}, w.options...)
	return connect.NewClient[message, message](client, s.url+"/"+name, options...)
}

func (s *server) message(t *testing.T, name, json string) *message {
	t.Helper()
	made := dynamicpb.NewMessage(s.methods[name].Input())
	must(t, protojson.Unmarshal([]byte(json), made))
	return made
}

func (s *server) unary(t *testing.T, w way, client *http.Client, name, json string) (*message, error) {
	t.Helper()
	request := connect.NewRequest(s.message(t, name, json))
	request.Header().Set("authorization", "Bearer "+s.key)
	answer, err := s.rpc(w, client, name).CallUnary(context.Background(), request)
	if err != nil {
		return nil, err
	}
	return answer.Msg, nil
}

// sessions that there are, whatever became of them.
func (s *server) sessions(t *testing.T) int {
	t.Helper()
	sure := ways()["Connect binary HTTP/1.1"]
	json := `{"pageSize": 100, "includeTerminated": true}`
	answer, err := s.unary(t, sure, s.client(sure), control+"/ListWorkspaceSandboxes", json)
	must(t, err)
	return get(answer, "sessions").List().Len()
}

const small = `{"ownerId": "self", "ownerType": "SERVICE", "cpuCores": 1, "memoryMb": 128, "allowOutbound": false, "waitReady": true}`

func TestEveryProtocolEncodingVersionAndTransport(t *testing.T) {
	for transport, secure := range map[string]bool{"clear text": false, "TLS": true} {
		s := start(t, secure)
		for name, w := range ways() {
			t.Run(name+" "+transport, func(t *testing.T) { s.walk(t, w) })
		}
		t.Run("gRPC without trailers "+transport, func(t *testing.T) { s.withoutTrailers(t) })
	}
}

// walk makes a call of each kind.
func (s *server) walk(t *testing.T, w way) {
	client := s.client(w)
	before := s.sessions(t)
	created, err := s.unary(t, w, client, control+"/CreateSession", small)
	must(t, err)
	session := get(created, "session").Message().Interface().(*message)
	id := get(session, "id").String()
	defer func() {
		_, err := s.unary(t, w, client, control+"/TerminateSession", fmt.Sprintf(`{"sessionId": %q}`, id))
		must(t, err)
	}()
	if now := s.sessions(t); now != before+1 {
		t.Errorf("one session was made, not %d", now-before)
	}

	_, err = s.unary(t, w, client, control+"/GetSession", fmt.Sprintf(`{"sessionId": %q}`, unknownID))
	refused(t, err, connect.CodeNotFound, "session not found [session_not_found]")
	_, err = s.unary(t, w, client, control+"/GetSession", `{"sessionId": "長屋"}`)
	refused(t, err, connect.CodeInvalidArgument, "[invalid_id]")

	// From the server.
	wait := connect.NewRequest(s.message(t, control+"/WaitSession", fmt.Sprintf(`{"sessionId": %q}`, id)))
	wait.Header().Set("authorization", "Bearer "+s.key)
	stream, err := s.rpc(w, client, control+"/WaitSession").CallServerStream(context.Background(), wait)
	must(t, err)
	states := 0
	for stream.Receive() {
		states++
	}
	must(t, stream.Err())
	if states != 1 {
		t.Errorf("%d states of a session that runs", states)
	}
	must(t, stream.Close())

	// To the server.
	credential := get(get(created, "credential").Message().Interface().(*message), "credential").String()
	name := dataPlane + "/WriteFileStream"
	upload := s.rpc(w, client, name).CallClientStream(context.Background())
	upload.RequestHeader().Set("x-tenki-session-cert", credential)
	must(t, upload.Send(s.message(t, name, fmt.Sprintf(`{"frame": {"start": {"sessionId": %q, "path": "a"}}}`, id))))
	must(t, upload.Send(s.message(t, name, `{"frame": {"data": "aGVsbG8="}}`)))
	_, err = upload.CloseAndReceive()
	must(t, err)
	name = dataPlane + "/ReadFile"
	read := connect.NewRequest(s.message(t, name, fmt.Sprintf(`{"request": {"sessionId": %q, "path": "a"}}`, id)))
	read.Header().Set("x-tenki-session-cert", credential)
	_, err = s.rpc(w, client, name).CallUnary(context.Background(), read)
	must(t, err)

	// Both ways, which this client does over HTTP/2 only.
	if !w.http2 {
		return
	}
	name = dataPlane + "/Run"
	run := s.rpc(w, client, name).CallBidiStream(context.Background())
	run.RequestHeader().Set("x-tenki-session-cert", credential)
	must(t, run.Send(s.message(t, name, fmt.Sprintf(`{"frame": {"start": {"sessionId": %q, "cmd": ["cat", "a"]}}}`, id))))
	must(t, run.CloseRequest())
	output := ""
	for {
		frame, err := run.Receive()
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		output += frame.String()
	}
	if !strings.Contains(output, "hello") {
		t.Errorf("the command said %q", output)
	}
	must(t, run.CloseResponse())
}

// A client that does not say that it takes trailers would never hear what became of a gRPC call over HTTP/1.1.
func (s *server) withoutTrailers(t *testing.T) {
	w := ways()["gRPC binary HTTP/1.1"]
	client := s.client(w)
	client.Transport = silent{client.Transport}
	before := s.sessions(t)
	_, err := s.unary(t, w, client, control+"/CreateSession", small)
	refused(t, err, connect.CodeUnimplemented, "[transport_unfit]")
	if now := s.sessions(t); now != before {
		t.Errorf("a refused call made %d sessions", now-before)
	}
}

// silent says nothing of trailers.
type silent struct{ http.RoundTripper }

func (s silent) RoundTrip(request *http.Request) (*http.Response, error) {
	request = request.Clone(request.Context())
	request.Header.Del("Te")
	return s.RoundTripper.RoundTrip(request)
}

func get(of *message, field string) protoreflect.Value {
	return of.Get(of.Descriptor().Fields().ByName(protoreflect.Name(field)))
}

func refused(t *testing.T, err error, code connect.Code, text string) {
	t.Helper()
	if connect.CodeOf(err) != code || err == nil || !strings.Contains(err.Error(), text) {
		t.Errorf("%v, not %v with %q", err, code, text)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
