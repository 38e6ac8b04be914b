namespace Rollout.Engine;

/// <summary>Tells files from pipes and devices, which a model folder may hold by mistake or by malice.</summary>
internal static class RegularFile
{
    /// <summary>
    /// Throws before the file is opened: opening a pipe waits until another process writes to it, and a device may never end. Both have a
    /// length of 0, as an empty file has, which no file of a model may be either.
    /// </summary>
    /// <exception cref="IOException">It is a pipe, a device, or empty.</exception>
    public static void ThrowIfNot(string path)
    {
        FileInfo file = new(path);
        if (file.ResolveLinkTarget(returnFinalTarget: true) is FileInfo target) file = target;
        if (file.Exists && file.Length == 0) throw new IOException("it is empty, or not a regular file");
    }
}
