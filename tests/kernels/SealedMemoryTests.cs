using System.Diagnostics;

namespace Rollout.Kernels.Tests;

/// <summary>Memory that a trainer writes through a path and cannot shrink or remove.</summary>
public sealed class SealedMemoryTests
{
    [Fact]
    public void Others_write_by_the_path_what_is_read_here()
    {
        using SealedMemory memory = Create(10_000);
        using (FileStream file = File.Open(memory.Path, FileMode.Open, FileAccess.ReadWrite))
        {
            Assert.Equal(10_000, file.Length);
            file.Position = 9_990;
            file.Write([1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
        }

        Assert.Equal([9, 10], memory.Span(9_998, 2).ToArray());
        Assert.Equal([0, 1, 2], memory.Span(9_989, 3).ToArray());
    }

    [Theory]
    [InlineData(9_999)]
    [InlineData(0)]
    [InlineData(10_001)]
    public void Nobody_changes_its_size(long length)
    {
        using SealedMemory memory = Create(10_000);
        using FileStream file = File.Open(memory.Path, FileMode.Open, FileAccess.ReadWrite);
        Assert.ThrowsAny<SystemException>(() => file.SetLength(length));
        Assert.Equal(10_000, file.Length);
        Assert.Equal(10_000, memory.Span(0, 10_000).Length);
    }

    [Theory]
    [InlineData(-1, 1)]
    [InlineData(0, -1)]
    [InlineData(0, 101)]
    [InlineData(100, 1)]
    [InlineData(99, 2)]
    [InlineData(long.MaxValue, int.MaxValue)]
    public void A_span_outside_is_refused(long offset, int length)
    {
        using SealedMemory memory = Create(100);
        Assert.Throws<ArgumentOutOfRangeException>(() => memory.Span(offset, length).Length);
        Assert.Equal(0, memory.Span(100, 0).Length);
        Assert.Equal(100, memory.Span(0, 100).Length);
    }

    [Fact]
    public void Offsets_go_beyond_four_thousand_million()
    {
        using SealedMemory memory = Create((6L << 30) + 3);
        using (FileStream file = File.Open(memory.Path, FileMode.Open, FileAccess.ReadWrite))
        {
            long[] offsets = [5, (2L << 30) + 5, (4L << 30) + 5, (6L << 30) + 2];
            for (int i = 0; i < offsets.Length; i++)
            {
                file.Position = offsets[i];
                file.WriteByte((byte)(i + 1));
            }
        }

        Assert.Equal([1], memory.Span(5, 1).ToArray());
        Assert.Equal([2], memory.Span((2L << 30) + 5, 1).ToArray());
        Assert.Equal([3], memory.Span((4L << 30) + 5, 1).ToArray());
        Assert.Equal([4], memory.Span((6L << 30) + 2, 1).ToArray());
    }

    [Fact]
    public void It_ends_when_it_is_disposed_and_no_child_keeps_it()
    {
        SealedMemory memory = Create(100);
        using SealedMemory other = Create(100);
        Assert.NotEqual(memory.Name, other.Name);
        string path = memory.Path;
        Assert.Contains(memory.Name, new FileInfo(path).LinkTarget);
        ProcessStartInfo start = new("/bin/sh") { RedirectStandardOutput = true };
        start.ArgumentList.Add("-c");
        start.ArgumentList.Add("ls -l /proc/$$/fd");
        using (Process child = Process.Start(start)!)
        {
            string descriptors = child.StandardOutput.ReadToEnd();
            child.WaitForExit();
            Assert.Contains("->", descriptors);
            Assert.DoesNotContain(memory.Name, descriptors);
        }

        memory.Dispose();
        Assert.DoesNotContain(memory.Name, Descriptors());
        Assert.Contains(other.Name, Descriptors());
        Assert.Throws<ObjectDisposedException>(() => memory.Span(0, 1).Length);

        static string Descriptors() => string.Join('\n', Directory.GetFiles("/proc/self/fd").Select(file => new FileInfo(file).LinkTarget));
    }

    [Theory]
    [InlineData(0)]
    [InlineData(-1)]
    public void There_is_none_of_no_bytes(long bytes) => Assert.Throws<ArgumentOutOfRangeException>(() => SealedMemory.TryCreate(bytes));

    private static SealedMemory Create(long bytes)
    {
        SealedMemory? memory = SealedMemory.TryCreate(bytes);
        Assert.SkipWhen(memory == null, "This system has no sealed memory.");
        return memory!;
    }
}
