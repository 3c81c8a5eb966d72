// Every rpc of the contract: 78 + 11 + 2.

export const CONTROL = "tenki.sandbox.v1.SandboxService";
export const DATA = "tenki.sandbox.v1.SandboxSessionDataPlaneService";
/** What is offered beyond the contract. */
export const OWN = "nagaya.v1.NagayaService";
export const SSH = "tenki.sandbox.v1.SSHGatewayClientService";

export const RPCS = {
  [CONTROL]: `
    CreateSession CreateSessionCredential GetSession WaitSession ListSessions
    ListWorkspaceSandboxes ListProjectSandboxes UpdateSession CreateVolume GetVolume
    ListVolumes ListProjectVolumes UpdateVolume DeleteVolume ResizeVolume
    AttachVolume DetachVolume ExecuteCommand StreamCommandOutput GitOperation
    PauseSession ResumeSession TerminateSession TerminateSessions ExtendSession
    GetArtifactUploadUrl GetArtifactDownloadUrl ExposePort OpenPreview TouchPreview
    ReportSessionActivity UnexposePort ListExposedPorts CreatePreviewUrl DeletePreviewUrl
    BindPreviewUrl UnbindPreviewUrl ListPreviewUrls GetPreviewUrl ResolvePreviewToken
    UpdateSSHAuthorizedKeys CreateSnapshot GetSnapshot GetSnapshotDownloadURL ListSnapshots
    ListSessionSnapshots ListDanglingSnapshots ListWorkspaceSnapshots ListProjectSnapshots GetWorkspaceSandboxUsage
    GetWorkspaceSandboxSettings UpdateWorkspaceSandboxSettings GetWorkspaceSnapshotRetentionSettings UpdateWorkspaceSnapshotRetentionSettings UpdateSnapshot
    DeleteSnapshot CreateTemplate GetTemplate ListTemplates ListProjectTemplates
    UpdateTemplate DeleteTemplate BuildTemplate CancelTemplateBuild GetTemplateBuild
    ListActiveTemplateBuilds PublishRegistryImage SetRegistryImageVisibility DeleteRegistryImage DeleteRegistryImageVersion
    ListRegistryImages GetRegistryImage ResolveRegistryRef ShareImage RevokeRegistryShareGrant
    ListRegistryShareGrants UnshareRegistryImage WhoAmI
  `,
  [DATA]: "Run Dial HostPortTunnel ReadFile WriteFile ReadFileStream WriteFileStream Stat Mkdir Remove List",
  [SSH]: "IssueSandboxSSHCert ListActiveSSHGateways",
};
for (const service of Object.keys(RPCS)) RPCS[service] = RPCS[service].trim().split(/\s+/);

/** Those that the server has so far. The others must answer `unimplemented`. */
export const BUILT = new Set(
  `CreateSession CreateSessionCredential GetSession WaitSession ListSessions ListWorkspaceSandboxes
   ListProjectSandboxes UpdateSession ExtendSession TerminateSession TerminateSessions ReportSessionActivity
   GetWorkspaceSandboxUsage ExecuteCommand StreamCommandOutput GitOperation WhoAmI
   PauseSession ResumeSession CreateSnapshot GetSnapshot GetSnapshotDownloadURL UpdateSnapshot DeleteSnapshot
   ListSnapshots ListSessionSnapshots ListDanglingSnapshots ListWorkspaceSnapshots ListProjectSnapshots
   CreateVolume GetVolume ListVolumes ListProjectVolumes UpdateVolume ResizeVolume DeleteVolume AttachVolume DetachVolume
   GetWorkspaceSandboxSettings UpdateWorkspaceSandboxSettings
   GetWorkspaceSnapshotRetentionSettings UpdateWorkspaceSnapshotRetentionSettings
   Run ReadFile WriteFile ReadFileStream WriteFileStream Stat Mkdir Remove List
   ExposePort UnexposePort ListExposedPorts CreatePreviewUrl GetPreviewUrl ListPreviewUrls BindPreviewUrl UnbindPreviewUrl
   DeletePreviewUrl OpenPreview TouchPreview ResolvePreviewToken
   UpdateSSHAuthorizedKeys IssueSandboxSSHCert ListActiveSSHGateways Dial HostPortTunnel`.split(/\s+/),
);

export const STREAMS = new Set([
  "WaitSession", "StreamCommandOutput", "Run", "Dial", "HostPortTunnel", "ReadFileStream", "WriteFileStream",
]);
