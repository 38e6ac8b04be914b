using System.Diagnostics;
using Xunit;

namespace Rollout.Client.Tests;

public sealed class PayloadFileTests : IDisposable
{
    private readonly string _folder = Directory.CreateTempSubdirectory("shm-").FullName;

    public void Dispose() => Directory.Delete(_folder, recursive: true);

    [Fact]
    public void No_other_user_can_read_it_and_it_is_removed_when_disposed()
    {
        string path;
        using (PayloadFile file = PayloadFile.Create(12_345, _folder))
        {
            path = file.Path;
            Assert.StartsWith($"rollout-{Environment.ProcessId}-", Path.GetFileName(path));
            Assert.Equal(12_345, new FileInfo(path).Length);
            if (!OperatingSystem.IsWindows())
                Assert.Equal(UnixFileMode.UserRead | UnixFileMode.UserWrite, File.GetUnixFileMode(path));
            file.Write("abc"u8, 100);
            Assert.Equal((byte)'c', File.ReadAllBytes(path)[102]);
        }

        Assert.False(File.Exists(path));
    }

    [Fact]
    public void Files_of_dead_owners_are_removed_and_all_others_left()
    {
        int dead = DeadProcessId();
        string mine = Touch($"rollout-{Environment.ProcessId}-0123456789abcdef");
        string leftover = Touch($"rollout-{dead}-0123456789abcdef");
        string otherName = Touch($"rollout-{dead}-notes.txt");
        string locked = Touch($"rollout-{dead}-fedcba9876543210");
        // Locked as by a process in another container, whose id is not valid here.
        using (File.OpenHandle(locked, FileMode.Open, FileAccess.ReadWrite, FileShare.ReadWrite))
        {
            using PayloadFile file = PayloadFile.Create(1, _folder);
            Assert.False(File.Exists(leftover));
            Assert.All([mine, otherName, locked, file.Path], path => Assert.True(File.Exists(path)));
            Assert.Equal(0, PayloadFile.RemoveLeftovers(_folder));
        }

        Assert.Equal(1, PayloadFile.RemoveLeftovers(_folder));
        Assert.False(File.Exists(locked));
    }

    [Fact]
    public void Too_little_room_is_an_error_that_says_what_to_do_and_leaves_nothing()
    {
        IOException error = Assert.Throws<IOException>(() => PayloadFile.Create(1L << 55, _folder));
        Assert.Contains("another folder", error.Message);
        Assert.Contains("PushTransport.Inline", error.Message);
        Assert.Empty(Directory.GetFiles(_folder));
    }

    private static int DeadProcessId()
    {
        using Process process = Process.Start("/bin/true");
        process.WaitForExit();
        return process.Id;
    }

    private string Touch(string name)
    {
        string path = Path.Combine(_folder, name);
        File.WriteAllText(path, "x");
        return path;
    }
}
