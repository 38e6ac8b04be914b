using System.Runtime.CompilerServices;

[assembly: InternalsVisibleTo("Rollout.Engine.Tests")]
