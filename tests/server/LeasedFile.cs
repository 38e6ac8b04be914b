using System.Runtime.InteropServices;
using Microsoft.Win32.SafeHandles;
using Xunit;

namespace Rollout.Server.Tests;

/// <summary>
/// A file that no other process can open until this is disposed, or for 45 s: the kernel first asks us, the holder of a lease, to finish.
/// </summary>
internal sealed class LeasedFile : IDisposable
{
    private const int SetLease = 1024, WriteLease = 1;

    private readonly SafeFileHandle _file;

    // The question is a signal, which would end this process.
    private readonly PosixSignalRegistration _asked = PosixSignalRegistration.Create((PosixSignal)29, signal => signal.Cancel = true);

    public LeasedFile(string path)
    {
        _file = File.OpenHandle(path, FileMode.Open, FileAccess.ReadWrite);
        Assert.Equal(0, Control(_file, SetLease, WriteLease));
    }

    public void Dispose()
    {
        _file.Dispose();
        _asked.Dispose();
    }

    [DllImport("libc", EntryPoint = "fcntl", SetLastError = true)]
    private static extern int Control(SafeFileHandle file, int command, int argument);
}
